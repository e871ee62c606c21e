// Backward kernels of the norms; formulas in ops/norm.h, the reasons in norm.cu.
//
// mean_g = mean(g) and mean_g_xhat = mean(g * xhat) are a row's two sums; for rms_norm mean_g is 0. The second kernel
// that every backward needs, norm_reduce, adds the blocks' partial weight gradients.
#pragma once

#include "../ops/norm.h"
#include "norm_layout.cuh"

namespace bigmodel::cuda {

template <class C>
struct RowStatistics {
  C mean, rstd;
  __device__ RowStatistics(const NormBackward& a, int64_t row)
      : mean(a.mean && !a.from_output && row < a.rows ? static_cast<const C*>(a.mean)[row] : 0),
        rstd(row < a.rows ? static_cast<const C*>(a.rstd)[row] : 0) {}
};

// xhat from the output; where a weight is 0 the output says nothing about xhat, and 0 is taken. The quotient of floats
// is the device's own (2 ulp): the exact one is a function call, and its registers would spill.
__device__ inline float quotient(float x, float y) { return __fdividef(x, y); }
__device__ inline double quotient(double x, double y) { return x / y; }
template <class C>
__device__ C xhat_from(C out, C weight, C bias) {
  return weight == 0 ? C(0) : quotient(out - bias, weight);
}

// weight + offset; ones where there is no weight.
template <class W, class C, int E>
__device__ void load_weight(C (&w)[E], const void* weight, int col, C offset) {
  if (weight) {
    Pack<W, E>::load(static_cast<const W*>(weight) + col).unpack(w);
#pragma unroll
    for (int e = 0; e < E; ++e) w[e] += offset;
  } else {
#pragma unroll
    for (int e = 0; e < E; ++e) w[e] = 1;
  }
}

// x, grad_out and everything else of dtype T, weights of dtype W, every row in packs.
//
// A block (or, for a long row, a cluster) is persistent: it takes blockDim.y rows at a time, a grid's width apart.
// While it works on one set of rows the next one's x and grad_out travel to shared memory; a thread reads only what it
// has itself sent for, so that needs no barrier. The thread keeps its columns' weight gradients in registers
// throughout.
template <class T, class W>
__global__ void __launch_bounds__(kMaxThreads, 1)
norm_backward(const NormBackward a, const int cluster, const int stages, const bool centred) {
  using C = Compute<T>;
  constexpr int E = kElements<T>;
  using X = Pack<T, E>;
  const int group = blockIdx.x / cluster, chunk = blockIdx.x % cluster;
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.x / cluster) * blockDim.y;
  const Columns<E> columns(chunk, a.cols);
  const int tensors = a.grad_summed ? 3 : 2;
  const auto slot = [&](int stage, int which, int k) {
    return dynamic_shared + ((stage * tensors + which) * kPacks + k) * threads + thread;
  };
  const auto fetch = [&](int64_t row, int stage) {
    const T* saved = static_cast<const T*>(a.saved) + row * a.saved_stride;
    const T* grad_out = static_cast<const T*>(a.grad_out) + row * a.grad_out_stride;
    const T* grad_summed = static_cast<const T*>(a.grad_summed) + row * a.grad_summed_stride;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (row >= a.rows || !columns.has(k)) continue;
      copy_async(slot(stage, 0, k), saved + columns.at(k));
      copy_async(slot(stage, 1, k), grad_out + columns.at(k));
      if (a.grad_summed) copy_async(slot(stage, 2, k), grad_summed + columns.at(k));
    }
    commit_copies();
  };
  if (cluster > 1) cluster_arrive();

  C grad_weight[kPacks][E] = {}, grad_bias[kPacks][E] = {};
  RowSum<C, 2> row_sum(cluster);
  int64_t first = int64_t(group) * blockDim.y;
  int stage = 0;
  fetch(first + threadIdx.y, stage);
  RowStatistics<C> coming(a, first + threadIdx.y);
  if (cluster > 1) cluster_wait();
  for (; first < a.rows; first += step) {
    const int64_t row = first + threadIdx.y;
    const RowStatistics<C> statistics = coming;
    coming = RowStatistics<C>(a, row + step);
    if (stages > 1) {
      fetch(row + step, stage ^ 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    const bool live = row < a.rows;
    const auto load = [&](C(&xhat)[E], C(&grad)[E], C(&w)[E], int k) {
      X::load(reinterpret_cast<const T*>(slot(stage, 0, k))).unpack(xhat);
      X::load(reinterpret_cast<const T*>(slot(stage, 1, k))).unpack(grad);
      load_weight<W>(w, a.weight, columns.at(k), C(a.weight_offset));
      if (a.from_output) {
        C b[E] = {};
        if (a.bias) Pack<W, E>::load(static_cast<const W*>(a.bias) + columns.at(k)).unpack(b);
#pragma unroll
        for (int e = 0; e < E; ++e) xhat[e] = xhat_from(xhat[e], w[e], b[e]);
      } else {
#pragma unroll
        for (int e = 0; e < E; ++e) xhat[e] = (xhat[e] - statistics.mean) * statistics.rstd;
      }
    };

    C sum[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!live || !columns.has(k)) continue;
      C xhat[E], grad[E], w[E];
      load(xhat, grad, w, k);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        sum[0] = fma(grad[e], w[e], sum[0]);
        sum[1] = fma(grad[e] * w[e], xhat[e], sum[1]);
        grad_weight[k][e] = fma(grad[e], xhat[e], grad_weight[k][e]);
        grad_bias[k][e] += grad[e];
      }
    }
    row_sum(sum);
    const C mean_g = centred ? sum[0] / C(a.cols) : C(0), mean_g_xhat = sum[1] / C(a.cols);

    T* grad_x = static_cast<T*>(a.grad_x) + row * a.cols;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!live || !columns.has(k)) continue;
      C xhat[E], grad[E], w[E], add[E] = {};
      load(xhat, grad, w, k);
      if (a.grad_summed) X::load(reinterpret_cast<const T*>(slot(stage, 2, k))).unpack(add);
#pragma unroll
      for (int e = 0; e < E; ++e)
        grad[e] = fma(statistics.rstd, fma(-xhat[e], mean_g_xhat, fma(grad[e], w[e], -mean_g)), add[e]);
      X::of(grad).store(grad_x + columns.at(k));
    }
    if (stages > 1) stage ^= 1;
    else fetch(row + step, stage);
  }
  if (!a.partials) return;

  // Rows side by side hold the same columns. They are added in their order: within a warp by shuffles, then holder by
  // holder through shared memory, which the copies no longer need.
  const int lanes = blockDim.x, holder_threads = max(lanes, kWarp), holders = threads / holder_threads;
  for (int offset = lanes; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
#pragma unroll
      for (int e = 0; e < E; ++e) {
        grad_weight[k][e] += __shfl_xor_sync(~0u, grad_weight[k][e], offset);
        grad_bias[k][e] += __shfl_xor_sync(~0u, grad_bias[k][e], offset);
      }
    }
  }
  C* const partial = static_cast<C*>(a.partials) + int64_t(group) * 2 * a.cols;
  const auto pass_on = [&](C(&grad)[kPacks][E], int which, int holder) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!columns.has(k)) continue;
      C* const shared = reinterpret_cast<C*>(dynamic_shared) + ((which * kPacks + k) * lanes + int(threadIdx.x)) * E;
      if (holder > 0) {
        C before[E];
        Pack<C, E>::load(shared).unpack(before);
#pragma unroll
        for (int e = 0; e < E; ++e) grad[k][e] += before[e];
      }
      Pack<C, E>::of(grad[k]).store(holder + 1 < holders ? shared : partial + which * a.cols + columns.at(k));
    }
  };
  for (int holder = 0; holder < holders; ++holder) {
    __syncthreads();
    if (thread / holder_threads != holder || thread % holder_threads >= lanes) continue;
    if (a.grad_weight) pass_on(grad_weight, 0, holder);
    if (a.grad_bias) pass_on(grad_bias, 1, holder);
  }
}

// Every dtype, any address, stride and length; the same row sums in the same order. A thread adds up its columns'
// weight gradients in shared memory, element by element across the threads (no bank conflicts), or, where they do not
// fit (`wide`, one row at a time), in the block's row of `partials`.
template <class C, int E>
__global__ void __launch_bounds__(kMaxThreads, 1)
norm_backward_any(const NormBackward a, const int64_t chunks, const bool wide, const bool centred) {
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  C* const shared = reinterpret_cast<C*>(dynamic_shared);
  C* const partial = static_cast<C*>(a.partials) + int64_t(blockIdx.x) * 2 * a.cols;
  const auto column = [&](int64_t pack) { return (pack * blockDim.x + threadIdx.x) * E; };
  const auto count = [&](int64_t col) { return int(min(int64_t(E), a.cols - col)); };
  const int64_t packs = chunks * kPacks;
  const auto grad_sum = [&](int which, int64_t pack, int e) -> C& {
    return wide ? partial[which * a.cols + column(pack) + e]
                : shared[((which * packs + pack) * E + e) * threads + thread];
  };
  if (a.partials) {
    for (int64_t pack = 0; column(pack) < a.cols; ++pack)
      for (int e = 0; e < count(column(pack)); ++e) grad_sum(0, pack, e) = grad_sum(1, pack, e) = 0;
  }

  RowSum<C, 2> row_sum(1);
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < a.rows; first += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y, cols = row < a.rows ? a.cols : 0;
    const RowStatistics<C> statistics(a, row);
    const auto load = [&](C(&xhat)[E], C(&grad)[E], C(&w)[E], int64_t col) {
      const int n = count(col);
      load_any(xhat, a.saved, a.from_output ? a.out_dtype : a.x_dtype, row * a.saved_stride + col, n);
      load_any(grad, a.grad_out, a.out_dtype, row * a.grad_out_stride + col, n);
      if (a.weight) load_any(w, a.weight, a.weight_dtype, col, n);
      C b[E] = {};
      if (a.from_output && a.bias) load_any(b, a.bias, a.weight_dtype, col, n);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        w[e] = a.weight ? w[e] + C(a.weight_offset) : C(1);
        xhat[e] = a.from_output ? xhat_from(xhat[e], w[e], b[e]) : (xhat[e] - statistics.mean) * statistics.rstd;
      }
    };

    C sum[2] = {0, 0};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      C part[2] = {0, 0};
      for (int64_t pack = chunk * kPacks; pack < (chunk + 1) * kPacks && column(pack) < cols; ++pack) {
        C xhat[E], grad[E], w[E];
        load(xhat, grad, w, column(pack));
#pragma unroll
        for (int e = 0; e < E; ++e) {
          if (e >= count(column(pack))) continue;
          part[0] = fma(grad[e], w[e], part[0]);
          part[1] = fma(grad[e] * w[e], xhat[e], part[1]);
        }
      }
      row_sum(part);
      sum[0] += part[0];
      sum[1] += part[1];
    }
    const C mean_g = centred ? sum[0] / C(a.cols) : C(0), mean_g_xhat = sum[1] / C(a.cols);

    for (int64_t pack = 0, col = column(0); col < cols; col = column(++pack)) {
      const int n = count(col);
      C xhat[E], grad[E], w[E], add[E] = {};
      load(xhat, grad, w, col);
      if (a.grad_summed) load_any(add, a.grad_summed, a.x_dtype, row * a.grad_summed_stride + col, n);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        if (a.partials && e < n) {
          grad_sum(0, pack, e) = fma(grad[e], xhat[e], grad_sum(0, pack, e));
          grad_sum(1, pack, e) += grad[e];
        }
        grad[e] = fma(statistics.rstd, fma(-xhat[e], mean_g_xhat, fma(grad[e], w[e], -mean_g)), add[e]);
      }
      store_any(a.grad_x, a.x_dtype, row * a.cols + col, grad, n);
      if (a.grad_cast) store_any(a.grad_cast, a.cast_dtype, row * a.cols + col, grad, n);
    }
  }
  if (!a.partials || wide) return;
  __syncthreads();
  const int lanes = blockDim.x;
  for (int64_t i = thread; i < 2 * packs * E * lanes; i += threads) {
    const int64_t slot = i / lanes, lane = i % lanes, which = slot / (packs * E), pack = slot / E % packs;
    const int64_t col = (pack * lanes + lane) * E + slot % E;
    C sum = 0;
    if (col >= a.cols) continue;
    for (int side = 0; side < blockDim.y; ++side) sum += shared[slot * threads + side * lanes + lane];
    partial[which * a.cols + col] = sum;
  }
}

// grad_weight (blockIdx.y 0) and grad_bias (1): the sum of `groups` rows of partials, kReduceRows threads to a column.
constexpr int kReduceRows = 16;

template <class C>
__global__ void __launch_bounds__(kWarp * kReduceRows) norm_reduce(const NormBackward a, const int64_t groups) {
  void* const grad = blockIdx.y ? a.grad_bias : a.grad_weight;
  if (!grad) return;
  const int64_t col = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  const C* const partial = static_cast<const C*>(a.partials) + blockIdx.y * a.cols + col;
  C sum[1] = {0};
  if (col < a.cols)
    for (int64_t group = threadIdx.y; group < groups; group += kReduceRows) sum[0] += partial[group * 2 * a.cols];
  __shared__ C sums[kReduceRows][kWarp];
  sums[threadIdx.y][threadIdx.x] = sum[0];
  __syncthreads();
  if (threadIdx.y > 0 || col >= a.cols) return;
  for (int y = 1; y < kReduceRows; ++y) sum[0] += sums[y][threadIdx.x];
  store_any(grad, a.weight_dtype, col, sum, 1);
}

}  // namespace bigmodel::cuda
