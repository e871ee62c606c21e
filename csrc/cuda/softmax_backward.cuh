// Backward kernels of the softmax; formulas in ops/softmax.h, the reasons in softmax.cu.
//
// SoftmaxBackward::scratch holds grad_z, (rows, keys), where the mask's gradient is wanted, and after it one number for
// each row where that of the sinks is. Their sums are taken by kernels of their own, each in a fixed order.
#pragma once

#include "softmax_rows.cuh"

namespace bigmodel::cuda {

template <class C>
__device__ C* grad_z_of(const SoftmaxBackward& a) {
  return a.grad_mask ? static_cast<C*>(a.scratch) : nullptr;
}
template <class C>
__device__ C* shares_of(const SoftmaxBackward& a, int64_t rows) {
  return static_cast<C*>(a.scratch) + (a.grad_mask ? rows * a.rows.keys : 0);
}

// What an element adds to the sum over its row.
template <class C>
__device__ C term(const SoftmaxBackward& a, C g, C y, C sum) {
  return a.rows.log ? sum + g : fma(g, y, sum);
}

// grad_z of E elements from key `col` on, in `g`.
template <class C, int E>
__device__ void finish_z(C (&g)[E], const C (&y)[E], const SoftmaxBackward& a, const SoftmaxRow& row, int64_t col,
                         C d) {
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const C z = a.rows.log ? fma(-exponential(y[e]), d, g[e]) : y[e] * (g[e] - d);
    g[e] = row.live(col + e) ? z : C(0);
  }
}

// And the scores' gradient from it.
template <class C, int E>
__device__ void finish_scores(C (&g)[E], const C (&s)[E], const SoftmaxBackward& a) {
  const C scale = C(a.rows.scale);
  if (a.rows.softcap != 0) {
    const C by_cap = C(a.rows.scale / a.rows.softcap);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const C t = hyperbolic(s[e] * by_cap);
      g[e] = g[e] == C(0) ? C(0) : g[e] * scale * fma(-t, t, C(1));  // an excluded score may be NaN
    }
  } else {
#pragma unroll
    for (int e = 0; e < E; ++e) g[e] *= scale;
  }
}

template <class C>
__device__ void share(const SoftmaxBackward& a, int64_t row, int64_t rows, C d) {
  if (a.grad_sinks && threadIdx.x == 0) shares_of<C>(a, rows)[row] = -d * value_at<C>(a.sink_probs, row);
}

// Everything of dtype T, every row in packs and short enough for the registers of a block: one read of y and grad_out.
// Grid: rows / blockDim.y blocks.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) softmax_backward(const SoftmaxBackward a, const int64_t rows) {
  using C = Compute<T>;
  constexpr int E = kElements<T>, K = kHeldPacks<T>;
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool exists = index < rows;
  const SoftmaxRow row(a.rows, exists ? index : 0);
  const int keys = exists ? int(a.rows.keys) : 0;
  const auto column = [&](int k) { return (k * int(blockDim.x) + int(threadIdx.x)) * E; };
  const auto wanted = [&](int k) { return column(k) < keys && column(k) < row.last && column(k) + E > row.first; };
  const T* grad_out = static_cast<const T*>(a.grad_out) + row.offset(a.grad_out_strides);
  const T* saved = static_cast<const T*>(a.saved) + index * a.rows.keys;

  C g[K][E] = {}, y[K][E] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!wanted(k)) continue;
    Pack<T, E>::load(grad_out + column(k)).unpack(g[k]);
    Pack<T, E>::load(saved + column(k)).unpack(y[k]);
  }
  C d[1] = {C(0)};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (a.rows.dropout_p > 0 && wanted(k)) drop(g[k], a.rows, index, column(k));
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (row.live(column(k) + e)) d[0] = term(a, g[k][e], y[k][e], d[0]);
  }
  RowSum<C, 1> row_sum(1);
  row_sum(d);
  if (!exists) return;
  share(a, index, rows, d[0]);
  T* grad_scores = static_cast<T*>(a.grad_scores) + index * a.rows.keys;
  C* grad_z = grad_z_of<C>(a);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int col = column(k);
    if (col >= keys) continue;
    finish_z(g[k], y[k], a, row, col, d[0]);
    if (grad_z) store_part(grad_z + index * a.rows.keys + col, g[k], E);
    if (a.scores && wanted(k))
      Pack<T, E>::load(static_cast<const T*>(a.scores) + row.offset(a.scores_strides) + col).unpack(y[k]);
    finish_scores(g[k], y[k], a);
    Pack<T, E>::of(g[k]).store(grad_scores + col);
  }
}

// Every dtype, any address, stride and length, the same sums in the same order: y and grad_out are read twice.
template <class C, int E>
__global__ void __launch_bounds__(kThreads, 1) softmax_backward_any(const SoftmaxBackward a, const int64_t rows) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool exists = index < rows;
  const SoftmaxRow row(a.rows, exists ? index : 0);
  const int64_t keys = exists ? a.rows.keys : 0, step = int64_t(blockDim.x) * E;
  const int64_t grad_out = row.offset(a.grad_out_strides), saved = index * a.rows.keys;
  const auto load = [&](C(&g)[E], C(&y)[E], int64_t col) {
    const int count = int(min(int64_t(E), keys - col));
    const bool wanted = col < row.last && col + E > row.first;
#pragma unroll
    for (int e = 0; e < E; ++e) g[e] = y[e] = C(0);
    if (!wanted) return count;
    load_any(g, a.grad_out, a.out_dtype, grad_out + col, count);
    load_any(y, a.saved, a.out_dtype, saved + col, count);
    if (a.rows.dropout_p > 0) drop(g, a.rows, index, col);
    return count;
  };

  C d[1] = {C(0)};
  for (int64_t col = int64_t(threadIdx.x) * E; col < keys; col += step) {
    C g[E], y[E];
    load(g, y, col);
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (row.live(col + e)) d[0] = term(a, g[e], y[e], d[0]);
  }
  RowSum<C, 1> row_sum(1);
  row_sum(d);
  if (!exists) return;
  share(a, index, rows, d[0]);
  C* grad_z = grad_z_of<C>(a);
  for (int64_t col = int64_t(threadIdx.x) * E; col < keys; col += step) {
    C g[E], y[E];
    const int count = load(g, y, col);
    finish_z(g, y, a, row, col, d[0]);
    if (grad_z) store_part(grad_z + saved + col, g, count);
    if (a.scores && col < row.last && col + E > row.first)
      load_any(y, a.scores, a.scores_dtype, row.offset(a.scores_strides) + col, count);
    finish_scores(g, y, a);
    store_any(a.grad_scores, a.scores_dtype, saved + col, g, count);
  }
}

constexpr int kReduceRows = 16;

// The mask's gradient: a warp's width of keys to a block, whose kReduceRows rows of threads share the rows that an
// element stands for; with one key for all, the keys are shared out too.
// Grid: (keys / kWarp or 1, mask rows).
template <class C>
__global__ void __launch_bounds__(kWarp *
                                  kReduceRows) softmax_reduce_mask(const SoftmaxBackward a, const int64_t rows) {
  __shared__ C sums[kReduceRows][kWarp + 1];
  const int64_t keys = a.rows.keys, mask_row = blockIdx.y + int64_t(gridDim.y) * blockIdx.z;
  int64_t mask_rows = 1;
  for (int d = 0; d < 4; ++d) mask_rows *= a.mask_dims.d[d];
  if (mask_row >= mask_rows) return;
  const int64_t members = rows / mask_rows, first = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  const C* grad_z = static_cast<const C*>(a.scratch);
  C sum = C(0);
  for (int64_t member = threadIdx.y; member < members; member += kReduceRows) {
    int64_t of_mask = mask_row, of_rows = member, row = 0, step = 1;
    for (int d = 3; d >= 0; --d) {
      const int64_t size = a.rows.dims.d[d];
      const bool own = a.mask_dims.d[d] == size;
      row += (own ? of_mask : of_rows) % size * step;
      if (own) of_mask /= size;
      else of_rows /= size;
      step *= size;
    }
    if (a.mask_keys == keys) {
      if (first < keys) sum += grad_z[row * keys + first];
    } else {
      for (int64_t key = threadIdx.x; key < keys; key += kWarp) sum += grad_z[row * keys + key];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0) return;
  for (int i = 1; i < kReduceRows; ++i) sum += sums[i][threadIdx.x];
  C* out = static_cast<C*>(a.grad_mask);
  if (a.mask_keys == keys) {
    if (first < keys) out[mask_row * keys + first] = sum;
    return;
  }
  sum = lane_sum(sum, kWarp);
  if (threadIdx.x == 0) out[mask_row] = sum;
}

// The sinks' gradient. Grid: heads.
template <class C>
__global__ void __launch_bounds__(kMaxThreads) softmax_reduce_sinks(const SoftmaxBackward a, const int64_t rows) {
  const int64_t heads = a.rows.dims.d[2], queries = a.rows.dims.d[3];
  const C* shares = shares_of<C>(a, rows);
  RowSum<C, 1> row_sum(1);
  C sum[1] = {C(0)};
  for (int64_t i = threadIdx.x; i < rows / heads; i += blockDim.x)
    sum[0] += shares[(i / queries * heads + blockIdx.x) * queries + i % queries];
  row_sum(sum);
  if (threadIdx.x == 0) static_cast<C*>(a.grad_sinks)[blockIdx.x] = sum[0];
}

}  // namespace bigmodel::cuda
