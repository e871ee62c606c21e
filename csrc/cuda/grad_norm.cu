// The norm of many gradients on CUDA; formulas in ops/grad_norm.h. Bytes per element in float32: 4, read once.
//
// A block sums one chunk of one row: at most 64 terms a thread in the compute type, then in float64 over the block. The
// chunks' sums lie in memory in the order of the table, and one block adds them up in a fixed order: no atomics, so the
// bits do not depend on which block is free first.
#include "../ops/grad_norm.h"
#include "multi_tensor.cuh"

namespace bigmodel::cuda {
namespace {

constexpr int kNormChunk = 64 * kUpdateThreads;
constexpr int kNormPacks = 4;  // of a thread on their way at once: 64 bytes

template <class C>
__device__ C join(C a, C b, int power) {
  if (power != 0) return a + b;
  return a > b || a != a ? a : b;
}

// Over the block, in a fixed order; thread 0 has the result.
__device__ double block_join(double value, int power) {
  __shared__ double of_warp[kUpdateThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = join(value, __shfl_xor_sync(~0u, value, offset), power);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kUpdateThreads / kWarp; ++warp) value = join(value, of_warp[warp], power);
  return value;
}

// Terms are added in one order, whether or not the address allows whole packs.
template <class T>
__device__ double chunk_total(const char* base, int n, int power) {
  using C = Compute<T>;
  constexpr int E = kPackBytes / int(sizeof(T)), kStep = kUpdateThreads * E;
  const T* const from = reinterpret_cast<const T*>(base);
  C total = 0, value[E];
  const auto add = [&](int count) {
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (e < count) total = join(total, power == 2 ? value[e] * value[e] : C(fabs(value[e])), power);
  };
  int at = threadIdx.x * E;
  if (Pack<T, E>::aligned(from)) {
    for (; at + (kNormPacks - 1) * kStep + E <= n; at += kNormPacks * kStep) {
      Pack<T, E> pack[kNormPacks];
#pragma unroll
      for (int u = 0; u < kNormPacks; ++u) pack[u] = Pack<T, E>::load(from + at + u * kStep);
#pragma unroll
      for (int u = 0; u < kNormPacks; ++u) {
        pack[u].unpack(value);
        add(E);
      }
    }
  }
  for (; at < n; at += kStep) {
    const int count = min(E, n - at);
    load_part(value, from + at, count);
    add(count);
  }
  return total;
}

__global__ void __launch_bounds__(kUpdateThreads)
grad_partials(const __grid_constant__ Part<1> part, double* partials, const int power) {
  const int row = row_of_block(part), format = part.format(row, kGradValue);
  const int64_t begin = int64_t(int(blockIdx.x) - part.first_block[row]) * kNormChunk;
  const int n = int(min(int64_t(kNormChunk), part.elements[row] - begin));
  const char* base = static_cast<const char*>(part.address[kGradValue][row]) + begin * bytes_of(format);
  double total = 0;
  switch (DType(format)) {
    case DType::float32: total = chunk_total<float>(base, n, power); break;
    case DType::bfloat16: total = chunk_total<BFloat16>(base, n, power); break;
    case DType::float16: total = chunk_total<Float16>(base, n, power); break;
    case DType::float64: total = chunk_total<double>(base, n, power); break;
  }
  const double joined = block_join(total, power);
  if (threadIdx.x == 0) partials[blockIdx.x] = joined;
}

__global__ void __launch_bounds__(kUpdateThreads)
grad_join(double* total, const double* partials, const int64_t count, const int power) {
  double value = 0;
  for (int64_t i = threadIdx.x; i < count; i += kUpdateThreads) value = join(value, partials[i], power);
  value = block_join(value, power);
  if (threadIdx.x == 0) *total = value;
}

__global__ void __launch_bounds__(1) grad_clip_kernel(const GradClip a) {
  const double norm = (a.power == 2 ? sqrt(*a.total) : *a.total) / scalar_or(a.grad_scale, 1);
  const bool skip = scalar_or(a.found_inf, 0) != 0 || (a.skip_nonfinite && norm - norm != 0);  // infinite or NaN
  if (a.norm_dtype == DType::float64) *static_cast<double*>(a.norm) = norm;
  else *static_cast<float*>(a.norm) = float(norm);
  const double factor = a.max_norm / (norm + 1e-6);
  *a.factor = factor > 1 ? 1 : factor;
  *a.skip = skip;
  if (a.skipped) *a.skipped += skip;
}

struct ScaleOp {
  static constexpr int kStreams = kGradStreams, kFormats = kGradStreams, kColumns = kGradStreams;
  static constexpr int kDeciding = 1, kStep = -1;
  static constexpr bool kQuantisable = false, kRounds = false;
  BIGMODEL_SHARED static constexpr Use use(int stream) {
    constexpr Use uses[kStreams] = {{true, true}};
    return uses[stream];
  }
  struct Args : GradScale {
    GradControl control{};
    void* scratch = nullptr;
  };

  double factor;

  __device__ ScaleOp(const Args& a, const double*, bool) : factor(*a.factor) {}
  __device__ bool idle() const { return factor == 1; }

  template <class C>
  __device__ void operator()(C (&x)[kStreams], uint32_t) const {
    x[kGradValue] *= C(factor);
  }
};

}  // namespace

int64_t grad_total_partials(const Table& table) {
  int64_t blocks = 0;
  for (int64_t row = 0; row < table.rows; ++row) blocks += (table.elements(row) + kNormChunk - 1) / kNormChunk;
  return blocks;
}

void grad_total(const GradTotal& a, Exec exec) {
  const char* op = "grad_total";
  const DeviceGuard guard(op, exec.index);
  int64_t first = 0;
  for_each_part<1>(a.table, kGradStreams, kNormChunk, [&](const Part<1>& part) {
    if (part.blocks)
      launch(grad_partials, dim3(part.blocks), dim3(kUpdateThreads), 0, 1, exec.stream, op, part, a.partials + first,
             a.power);
    first += part.blocks;
  });
  launch(grad_join, dim3(1), dim3(kUpdateThreads), 0, 1, exec.stream, op, a.total, a.partials, first, a.power);
}

void grad_clip(const GradClip& a, Exec exec) {
  const DeviceGuard guard("grad_clip", exec.index);
  launch(grad_clip_kernel, dim3(1), dim3(1), 0, 1, exec.stream, "grad_clip", a);
}

void grad_scale(const GradScale& args, Exec exec) { run<ScaleOp>(args.table, {args}, exec, "grad_scale"); }

}  // namespace bigmodel::cuda
