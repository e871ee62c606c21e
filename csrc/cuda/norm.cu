// Layer and root-mean-square normalisation on CUDA: which kernel runs, and with what shape. The kernels are in
// norm_forward.cuh and norm_backward.cuh; all formulas in ops/norm.h.
//
//   out = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * (weight + weight_offset) + bias       (rms_norm: no mean)
//
// Bytes that must move per element of n bytes: forward reads x and writes out, 2n (4n with a residual); backward reads
// x and grad_out and writes grad_x, 3n (4n with grad_summed). Weights stay in the caches. That traffic is the limit: an
// H100 has time for some 50 instructions per bfloat16 element while it passes, and the kernels need half of them. So:
//   - x is read once. A row lies in the registers of a part of a warp, a block or a cluster, as its length asks, and
//     the statistics take two passes over registers; one pass (sum and sum of squares) would save nothing and lose the
//     digits of rows with a large mean.
//   - Backward blocks are persistent, one on each SM, and fetch the next rows while they work on these, so that memory
//     never waits for arithmetic. The weight gradients stay in registers; one row of partial sums per block reaches
//     memory (132 blocks: 2 % of the traffic of 8192 x 4096 in bfloat16), and norm_reduce adds those in a fixed order.
//   - One kernel is compiled for each combination of dtypes that training uses, with 16-byte loads and stores. Other
//     mixtures, addresses and strides off 16 bytes, and rows too long for a cluster (or for a block, where there are no
//     clusters) go to the kernels named _any. They add up a row in the same order: a misaligned view has the same bits.
#include "../ops/norm.h"
#include "norm_backward.cuh"
#include "norm_forward.cuh"

namespace bigmodel::cuda {
namespace {

constexpr int kBlockThreads = 128;  // of a block that holds several short rows

// Whether a kernel for (T, T, W) is compiled: weights of x's own dtype, or float32 beside a 16-bit x.
bool fast_weights(DType weight, DType x) { return weight == x || (weight == DType::float32 && size_of(x) == 2); }

// Calls visitor(Tag<T>{}, Tag<W>{}).
template <class Visitor>
void visit_fast(DType x, DType weight, Visitor&& visitor) {
  visit_dtype(x, [&](auto tag) {
    if constexpr (sizeof(typename decltype(tag)::type) == 2) {
      if (weight == DType::float32) return visitor(tag, Tag<float>{});
    }
    visitor(tag, tag);
  });
}

// Calls visitor(Tag<C>{}, number of elements of x in 16 bytes).
template <class Visitor>
void visit_any(DType x, Visitor&& visitor) {
  visit_dtype(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visitor(Tag<Compute<T>>{}, std::integral_constant<int, kElements<T>>{});
  });
}

struct Tensor {
  const void* base;  // null for none
  int64_t stride;
  DType dtype;
};

// Whether every row of every tensor can be moved 16 bytes at a time.
bool in_packs(DType x_dtype, int64_t cols, std::initializer_list<Tensor> tensors) {
  bool aligned = cols * size_of(x_dtype) % kPackBytes == 0;
  for (const Tensor& t : tensors)
    aligned &= reinterpret_cast<uintptr_t>(t.base) % kPackBytes == 0 && t.stride * size_of(t.dtype) % kPackBytes == 0;
  return aligned;
}

template <class... Parameters>
bool can_cluster(void (*kernel)(Parameters...), const Layout& layout, const Device& device, const char* op) {
  return layout.chunks == 1 || (layout.chunks <= kMaxCluster && device.clusters && compiled_with_clusters(kernel, op));
}

// How many elements the packs of a block hold, those beyond a row's end included.
template <int E>
int64_t values_in_block(const Layout& layout, dim3 block) {
  return layout.chunks * kPacks * E * block.x * block.y;
}

// What an _any kernel may use of the shared memory: two of its blocks share an SM. It is enough for several short rows.
int64_t any_shared_bytes(const Device& gpu) {
  return std::max(kSharedWithoutAsking, (gpu.shared_bytes - kStaticSharedBytes) / 2);
}

void forward(const NormForward& a, Exec exec, bool centred, const char* op) {
  if (a.rows == 0 || a.cols == 0) return;
  const DeviceGuard guard(op, exec.index);
  const DType x_dtype = a.residual ? a.summed_dtype : a.input_dtype;
  // Rounding a float64 addend before it is added would be a silent cast, so there everything is in float64.
  const bool wide = a.input_dtype == DType::float64 || (a.residual && a.residual_dtype == DType::float64);
  const DType arithmetic = wide ? DType::float64 : x_dtype;
  const Layout layout(a.cols, size_of(arithmetic));
  const dim3 block(layout.lanes, layout.rows_in(kBlockThreads));
  const int64_t blocks = Layout::divide_up(a.rows, block.y);

  const bool same_dtype = a.input_dtype == x_dtype && a.out_dtype == x_dtype &&
                          (!a.residual || a.residual_dtype == x_dtype) &&
                          ((!a.weight && !a.bias) || fast_weights(a.weight_dtype, x_dtype));
  const bool packed = in_packs(x_dtype, a.cols,
                               {{a.input, a.input_stride, x_dtype},
                                {a.residual, a.residual_stride, x_dtype},
                                {a.summed},
                                {a.out},
                                {a.weight},
                                {a.bias}});
  bool done = false;
  if (same_dtype && packed) {
    visit_fast(x_dtype, a.weight_dtype, [&](auto x, auto w) {
      const auto kernel = norm_forward<typename decltype(x)::type, typename decltype(w)::type>;
      if (!can_cluster(kernel, layout, device(op, exec.index), op)) return;
      const int cluster = int(layout.chunks);
      launch(kernel, dim3(blocks * cluster), block, 0, cluster, exec.stream, op, a, cluster, centred);
      done = true;
    });
  }
  if (done) return;
  visit_any(arithmetic, [&](auto compute, auto elements) {
    using C = typename decltype(compute)::type;
    const int64_t bytes = values_in_block<elements>(layout, block) * int64_t(sizeof(C));
    const bool staged = bytes <= any_shared_bytes(device(op, exec.index));
    launch(norm_forward_any<C, elements>, dim3(blocks), block, staged ? bytes : 0, 1, exec.stream, op, a, layout.chunks,
           staged, centred);
  });
}

// Runs the fast kernel and returns how many rows of partials it filled; 0 where it cannot run.
template <class T, class W>
int64_t backward_in_packs(const NormBackward& a, const Layout& layout, Exec exec, bool centred, const char* op) {
  const auto kernel = norm_backward<T, W>;
  const Device& gpu = device(op, exec.index);
  if (!can_cluster(kernel, layout, gpu, op)) return 0;

  // Rows side by side in a block: a warp's worth, then enough to give every SM a block, and no more than fit.
  const int64_t thread_bytes = (a.grad_summed ? 3 : 2) * kPacks * kPackBytes;
  const int64_t most_threads = gpu.shared_bytes / thread_bytes;
  if (most_threads < layout.lanes) return 0;
  const int stages = most_threads >= 2 * layout.lanes ? 2 : 1;
  const int unit = std::max(1, kWarp / layout.lanes);
  const int64_t fitting = std::min<int64_t>(kMaxThreads, most_threads / stages) / (layout.lanes * unit);
  const int64_t wanted = Layout::divide_up(a.rows, int64_t(unit) * gpu.multiprocessors);
  const dim3 block(layout.lanes, unit * std::min(wanted, fitting));

  const int cluster = int(layout.chunks);
  const int64_t shared_bytes = stages * thread_bytes * block.x * block.y;
  const int64_t resident =
      cluster > 1 ? active_clusters(kernel, block, shared_bytes, cluster, op) : gpu.multiprocessors;
  const int64_t groups =
      std::min({Layout::divide_up(a.rows, block.y), resident, norm_backward_blocks(a.rows, a.cols, exec)});
  launch(kernel, dim3(groups * cluster), block, shared_bytes, cluster, exec.stream, op, a, cluster, stages, centred);
  return groups;
}

void backward(const NormBackward& a, Exec exec, bool centred, const char* op) {
  if (a.cols == 0) return;
  const DeviceGuard guard(op, exec.index);
  const Layout layout(a.cols, size_of(a.x_dtype));
  const bool same_dtype =
      a.out_dtype == a.x_dtype && !a.grad_cast && ((!a.weight && !a.bias) || fast_weights(a.weight_dtype, a.x_dtype));
  const bool packed = in_packs(a.x_dtype, a.cols,
                               {{a.saved, a.saved_stride, a.x_dtype},
                                {a.grad_out, a.grad_out_stride, a.x_dtype},
                                {a.grad_summed, a.grad_summed_stride, a.x_dtype},
                                {a.grad_x},
                                {a.partials},
                                {a.weight},
                                {a.bias}});
  int64_t groups = 0;
  if (a.rows > 0 && same_dtype && packed) {
    visit_fast(a.x_dtype, a.weight_dtype, [&](auto x, auto w) {
      groups = backward_in_packs<typename decltype(x)::type, typename decltype(w)::type>(a, layout, exec, centred, op);
    });
  }
  visit_any(a.x_dtype, [&](auto compute, auto elements) {
    using C = typename decltype(compute)::type;
    if (a.rows > 0 && groups == 0) {
      const dim3 block(layout.lanes, layout.rows_in(kBlockThreads));
      const int64_t bytes = a.partials ? 2 * values_in_block<elements>(layout, block) * int64_t(sizeof(C)) : 0;
      const bool wide = bytes > any_shared_bytes(device(op, exec.index));
      groups = std::min(Layout::divide_up(a.rows, block.y), norm_backward_blocks(a.rows, a.cols, exec));
      launch(norm_backward_any<C, elements>, dim3(groups), block, wide ? 0 : bytes, 1, exec.stream, op, a,
             layout.chunks, wide, centred);
    }
    if (a.grad_weight || a.grad_bias)
      launch(norm_reduce<C>, dim3(Layout::divide_up(a.cols, kWarp), 2), dim3(kWarp, kReduceRows), 0, 1, exec.stream, op,
             a, groups);
  });
}

}  // namespace

void layer_norm_forward(const NormForward& args, Exec exec) { forward(args, exec, true, "layer_norm_forward"); }
void rms_norm_forward(const NormForward& args, Exec exec) { forward(args, exec, false, "rms_norm_forward"); }
void layer_norm_backward(const NormBackward& args, Exec exec) { backward(args, exec, true, "layer_norm_backward"); }
void rms_norm_backward(const NormBackward& args, Exec exec) { backward(args, exec, false, "rms_norm_backward"); }

// The persistent kernel fills one row of partials per SM at most; norm_backward_any, which fetches nothing ahead, wants
// up to four blocks on an SM where that costs little.
int64_t norm_backward_blocks(int64_t rows, int64_t cols, Exec exec) {
  const int64_t per_multiprocessor = std::clamp<int64_t>(16384 / std::max<int64_t>(cols, 1), 1, 4);
  return std::min(rows, per_multiprocessor * device("norm_backward_blocks", exec.index).multiprocessors);
}

}  // namespace bigmodel::cuda
