// What the softmax kernels share: how a row lies over threads, where its data are, its live range, its scores after
// everything that is done to them, dropout, and the largest value of a row.
//
// A row is cut into packs of 16 bytes of scores; a thread takes the packs lane, lane + lanes, ..., so neighbours touch
// neighbouring addresses. Of a short row it holds up to kHeldPacks, as arithmetic sees them. Every kernel spreads a row
// likewise and adds it up in the same order, so its bits depend on its length and dtype alone: not on its address, and
// so not on its batch, whose strides decide which kernel runs.
#pragma once

#include "../ops/softmax.h"
#include "common.cuh"
#include "pack.cuh"

namespace bigmodel::cuda {

constexpr int kThreads = 256;    // of a block at most: two of them fit on an SM with 128 registers a thread
constexpr int kHeldBytes = 128;  // of a thread's elements in the arithmetic's type: 32 registers, or shared memory

template <class T>
constexpr int kElements = kPackBytes / int(sizeof(T));

template <class T>
constexpr int kHeldPacks = kHeldBytes / int(sizeof(Compute<T>)) / kElements<T>;

struct SoftmaxLayout {
  int lanes;  // threads of a row: a power of two up to a warp, or whole warps up to a block
  bool held;  // whether a block holds a row

  SoftmaxLayout(int64_t keys, int64_t elements, int64_t packs) {
    const int64_t wanted = divide_up(divide_up(keys, elements), packs);
    held = wanted <= kThreads;
    const int64_t threads = held ? wanted : kThreads;
    lanes = 1;
    while (lanes < threads && lanes < kWarp) lanes *= 2;
    if (threads > kWarp) lanes = int(divide_up(threads, kWarp) * kWarp);
  }

  static constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

template <class C>
__device__ constexpr C minus_infinity() {
  return -C(INFINITY);
}

__device__ inline float largest(float a, float b) { return b > a ? b : a; }  // not NaN, unless a is
__device__ inline double largest(double a, double b) { return b > a ? b : a; }

// The largest value over the threads of one row; to be called like RowSum.
template <class C>
__device__ C row_largest(C value) {
  __shared__ C of_warp[kMaxThreads / kWarp];
  const int lanes = blockDim.x;
  for (int offset = min(lanes, kWarp) / 2; offset > 0; offset /= 2)
    value = largest(value, __shfl_xor_sync(~0u, value, offset));
  if (lanes > kWarp) {
    const int warps = lanes / kWarp, first = threadIdx.y * warps, lane = threadIdx.x % kWarp;
    __syncthreads();  // an earlier call's slots may still be read
    if (lane == 0) of_warp[first + threadIdx.x / kWarp] = value;
    __syncthreads();
    value = lane < warps ? of_warp[first + lane] : minus_infinity<C>();
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value = largest(value, __shfl_xor_sync(~0u, value, offset));
  }
  return value;
}

// A row's coordinates, and the keys [first, last) that causal and window leave of it.
struct SoftmaxRow {
  int64_t index;
  int64_t coordinate[4];
  int64_t position, first, last;

  __device__ SoftmaxRow(const SoftmaxRows& r, int64_t row) : index(row) {
    if (row < INT32_MAX) {  // a division of 64 bits is ten times as long
      uint32_t rest = uint32_t(row);
#pragma unroll
      for (int d = 3; d >= 1; --d) {
        const uint32_t size = uint32_t(min(r.dims.d[d], int64_t(INT32_MAX)));
        coordinate[d] = rest % size;
        rest /= size;
      }
      coordinate[0] = rest;
    } else {
#pragma unroll
      for (int d = 3; d >= 0; --d) {
        coordinate[d] = row % r.dims.d[d];
        row /= r.dims.d[d];
      }
    }
    position = coordinate[3] + r.keys - r.dims.d[3];
    first = r.left == kUnlimited ? 0 : min(max(int64_t(0), position - r.left), r.keys);
    last = r.right == kUnlimited ? r.keys : max(first, min(r.keys, position + r.right + 1));
  }
  __device__ int64_t offset(const RowDims& strides) const {
    return coordinate[0] * strides.d[0] + coordinate[1] * strides.d[1] + coordinate[2] * strides.d[2] +
           coordinate[3] * strides.d[3];
  }
  __device__ bool live(int64_t key) const { return key >= first && key < last; }
};

template <class C>
__device__ C value_at(const void* values, int64_t index) {
  return static_cast<const C*>(values)[index];
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float hyperbolic(float x) { return tanhf(x); }
__device__ inline double hyperbolic(double x) { return tanh(x); }

// A product that is not fused with a later addition: z - max(z) must be 0 for the largest z, and fused it would be what
// rounding took from z, by which exp() of scores beyond 1e9 is infinite. And whether one is fused must not depend on
// the kernel: what may be is written fma.
__device__ inline float product(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double product(double x, double y) { return __dmul_rn(x, y); }

// E elements of the mask from key `col` on, as what is added.
template <class C, int E>
__device__ void load_mask(C (&added)[E], const SoftmaxForward& a, int64_t offset, int64_t col, int count) {
  if (a.mask_dtype == kBool) {
    const uint8_t* live = static_cast<const uint8_t*>(a.mask) + offset;
#pragma unroll
    for (int e = 0; e < E; ++e)
      added[e] = e < count && live[(col + e) * a.mask_key_stride] ? C(0) : minus_infinity<C>();
  } else if (a.mask_key_stride == 1) {
    load_any(added, a.mask, DType(a.mask_dtype), offset + col, count);
  } else {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      C one[1] = {C(0)};
      if (e < count) load_any(one, a.mask, DType(a.mask_dtype), offset + (col + e) * a.mask_key_stride, 1);
      added[e] = one[0];
    }
  }
}

// z of E scores from key `col` on; -inf for what is excluded and for what is beyond the row's end.
template <class C, int E>
__device__ void prepare(C (&z)[E], const SoftmaxForward& a, const SoftmaxRow& row, int64_t col, int count) {
  const C scale = C(a.rows.scale), cap = C(a.rows.softcap);
  if (cap != C(0)) {
    const C by_cap = C(a.rows.scale / a.rows.softcap);
#pragma unroll
    for (int e = 0; e < E; ++e) z[e] = product(hyperbolic(z[e] * by_cap), cap);
  } else {
#pragma unroll
    for (int e = 0; e < E; ++e) z[e] = product(z[e], scale);
  }
  if (a.mask) {
    C added[E];
    load_mask(added, a, row.offset(a.mask_strides), col, count);
#pragma unroll
    for (int e = 0; e < E; ++e) z[e] = added[e] == minus_infinity<C>() ? added[e] : z[e] + added[e];
  }
  if (a.slopes) {
    const C slope = value_at<C>(a.slopes, row.coordinate[2]);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const C away = C(row.position - col - e);
      z[e] = fma(-slope, away < C(0) ? -away : away, z[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < E; ++e)
    if (!row.live(col + e)) z[e] = minus_infinity<C>();
}

// Philox4x32-10 at one counter. Unrolled whole, the rounds made ptxas keep every key in a register on sm_100: 221 of
// softmax_forward_any, 88 now.
__device__ inline uint4 philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll 5
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(c0) * 0xD2511F53u, product1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Multiplies E elements from key `col` on, a multiple of E, by what dropout asks for.
template <class C, int E>
__device__ void drop(C (&value)[E], const SoftmaxRows& r, int64_t row, int64_t col) {
  const uint64_t seed = *static_cast<const uint64_t*>(r.seed);
  const uint32_t threshold = uint32_t(min(double(UINT32_MAX), r.dropout_p * 0x1p32 + 0.5));
  const C kept = C(1 / (1 - r.dropout_p));
  const uint64_t counter = uint64_t(row * ((r.keys + 3) / 4) + col / 4);
#pragma unroll
  for (int e = 0; e < E; e += 4) {
    const uint4 words = philox(seed, counter + e / 4);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < (E < 4 ? E : 4); ++i) {
      // Packs of two begin in the middle of a block of words.
      const uint32_t own = E < 4 && col % 4 != 0 ? word[(i + E) % 4] : word[i];
      value[e + i] = product(value[e + i], own >= threshold ? kept : C(0));
    }
  }
}

}  // namespace bigmodel::cuda
