// Forward kernels of the softmax; formulas in ops/softmax.h, the reasons in softmax.cu.
#pragma once

#include "softmax_rows.cuh"

namespace bigmodel::cuda {

template <class C>
__device__ C base_of(C peak) {
  return peak == minus_infinity<C>() ? C(0) : peak;
}

// 1 / sum in two parts, so that it rounds no digit of a product away.
template <class C>
struct Inverse {
  C high, low;
  __device__ explicit Inverse(C sum) : high(C(1) / sum), low(fma(-sum, high, C(1)) * high) {}
  __device__ C operator*(C value) const { return fma(value, high, value * low); }
};

// What a row's peak and sum make of its elements.
template <class C>
struct Finish {
  C peak, log_sum, dead;
  bool is_dead;
  Inverse<C> inverse;

  __device__ Finish(const SoftmaxForward& a, const SoftmaxRow& row, C peak_, C sum_)
      : peak(peak_), dead(a.empty_is_nan ? C(NAN) : C(0)), inverse(C(1)) {
    C sum = sum_;
    if (a.sinks) {
      const C sink = value_at<C>(a.sinks, row.coordinate[2]);
      const C higher = largest(peak, sink);
      if (peak != minus_infinity<C>()) sum *= exponential(peak - base_of(higher));
      const C share = sink == minus_infinity<C>() ? C(0) : exponential(sink - base_of(higher));
      sum += share;
      // The elements were taken relative to the row's own peak.
      inverse = Inverse<C>(sum);
      if (peak != minus_infinity<C>()) {
        const C moved = exponential(peak - base_of(higher));
        inverse.high *= moved;
        inverse.low *= moved;
      }
      if (a.sink_probs && threadIdx.x == 0) static_cast<C*>(a.sink_probs)[row.index] = sum == C(0) ? C(0) : share / sum;
    } else {
      inverse = Inverse<C>(sum);
    }
    is_dead = sum == C(0) && !a.rows.log;
    log_sum = a.rows.log ? C(log(sum)) : C(0);
  }
};

// Everything of dtype T, every row in packs and short enough for the registers of a block: one read, one write.
// Grid: rows / blockDim.y blocks.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) softmax_forward(const SoftmaxForward a, const int64_t rows) {
  using C = Compute<T>;
  constexpr int E = kElements<T>, K = kHeldPacks<T>;
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool exists = index < rows;
  const SoftmaxRow row(a.rows, exists ? index : 0);
  const int keys = exists ? int(a.rows.keys) : 0;
  const auto column = [&](int k) { return (k * int(blockDim.x) + int(threadIdx.x)) * E; };

  C z[K][E];
  C peak = minus_infinity<C>();
  const T* scores = static_cast<const T*>(a.scores) + row.offset(a.scores_strides);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int col = column(k);
    const bool wanted = col < keys && col < row.last && col + E > row.first;
    if (wanted) Pack<T, E>::load(scores + col).unpack(z[k]);
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (!wanted) z[k][e] = minus_infinity<C>();
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int col = column(k);
    if (col < keys && col < row.last && col + E > row.first) prepare(z[k], a, row, col, E);
#pragma unroll
    for (int e = 0; e < E; ++e) peak = largest(peak, z[k][e]);
  }
  peak = row_largest(peak);
  const C base = base_of(peak);
  RowSum<C, 1> row_sum(1);
  C sum[1] = {C(0)};
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const C power = exponential(z[k][e] - base);
      sum[0] += power;
      z[k][e] = a.rows.log ? z[k][e] - base : power;
    }
  }
  row_sum(sum);
  if (!exists) return;
  const Finish<C> finish(a, row, peak, sum[0]);
  T* out = static_cast<T*>(a.out) + row.offset(a.out_strides);
  T* probs = static_cast<T*>(a.probs) + index * a.rows.keys;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int col = column(k);
    if (col >= keys) continue;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (a.rows.log) z[k][e] -= finish.log_sum;
      else if (finish.is_dead) z[k][e] = row.live(col + e) ? finish.dead : C(0);
      else z[k][e] = finish.inverse * z[k][e];
    }
    if (a.probs) {
      Pack<T, E>::of(z[k]).store(probs + col);
      drop(z[k], a.rows, index, col);
    }
    Pack<T, E>::of(z[k]).store(out + col);
  }
}

// Every dtype, any address, stride and length. Of a row that fits (kHeld) a thread keeps its part in shared memory,
// element by element across the threads (no bank conflicts), and the same sums are taken in the same order. A longer
// one takes two passes: the running peak and sum of each thread (Milakov, Gimelshein, arXiv 1805.02867), then every
// element again.
template <class C, int E, bool kHeld>
__global__ void __launch_bounds__(kThreads, 2)
softmax_forward_any(const SoftmaxForward a, const int64_t rows) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool exists = index < rows;
  const SoftmaxRow row(a.rows, exists ? index : 0);
  const int64_t keys = exists ? a.rows.keys : 0, step = int64_t(blockDim.x) * E;
  const int64_t scores = row.offset(a.scores_strides), out = row.offset(a.out_strides);
  const int threads = blockDim.x * blockDim.y;
  C* const stage = reinterpret_cast<C*>(dynamic_shared) + threadIdx.y * blockDim.x + threadIdx.x;
  const auto load = [&](C(&z)[E], int64_t col) {
    const int count = int(min(int64_t(E), keys - col));
    const bool wanted = col < row.last && col + E > row.first;
#pragma unroll
    for (int e = 0; e < E; ++e) z[e] = minus_infinity<C>();
    if (!wanted) return;
    load_any(z, a.scores, a.scores_dtype, scores + col, count);
    prepare(z, a, row, col, count);
  };

  C peak = minus_infinity<C>(), own = C(0);
  C* slot = stage;
  for (int64_t col = int64_t(threadIdx.x) * E; col < keys; col += step) {
    C z[E];
    load(z, col);
    C higher = peak;
#pragma unroll
    for (int e = 0; e < E; ++e) higher = largest(higher, z[e]);
    if constexpr (kHeld) {
#pragma unroll
      for (int e = 0; e < E; ++e, slot += threads) *slot = z[e];
    } else {
      const C base = base_of(higher);
      if (higher != peak && peak != minus_infinity<C>()) own *= exponential(peak - base);
#pragma unroll
      for (int e = 0; e < E; ++e) own += exponential(z[e] - base);
    }
    peak = higher;
  }
  const C most = row_largest(peak), base = base_of(most);
  if constexpr (kHeld) {
    for (C *end = slot, *z = stage; z != end; z += threads) {
      const C power = exponential(*z - base);
      own += power;
      *z = a.rows.log ? *z - base : power;
    }
  } else if (peak != minus_infinity<C>()) {
    own *= exponential(peak - most);
  }
  RowSum<C, 1> row_sum(1);
  C sum[1] = {own};
  row_sum(sum);
  if (!exists) return;
  const Finish<C> finish(a, row, most, sum[0]);
  slot = stage;
  for (int64_t col = int64_t(threadIdx.x) * E; col < keys; col += step) {
    C z[E];
    if constexpr (kHeld) {
#pragma unroll
      for (int e = 0; e < E; ++e, slot += threads) z[e] = *slot;
    } else {
      load(z, col);
#pragma unroll
      for (int e = 0; e < E; ++e) z[e] = a.rows.log ? z[e] - base : exponential(z[e] - base);
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (a.rows.log) z[e] -= finish.log_sum;
      else if (finish.is_dead) z[e] = row.live(col + e) ? finish.dead : C(0);
      else z[e] = finish.inverse * z[e];
    }
    const int count = int(min(int64_t(E), keys - col));
    if (a.probs) {
      store_any<true>(a.probs, a.out_dtype, index * a.rows.keys + col, z, count);
      drop(z, a.rows, index, col);
    }
    store_any<true>(a.out, a.out_dtype, out + col, z, count);
  }
}

}  // namespace bigmodel::cuda
