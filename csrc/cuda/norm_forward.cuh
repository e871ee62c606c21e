// Forward kernels of the norms; formulas in ops/norm.h, the reasons in norm.cu.
#pragma once

#include "../ops/norm.h"
#include "norm_layout.cuh"

namespace bigmodel::cuda {

template <class Statistic, class C>
__device__ void store_statistics(const NormForward& a, int64_t row, C mean, C rstd) {
  if (a.mean) static_cast<Statistic*>(a.mean)[row] = Statistic(mean);
  if (a.rstd) static_cast<Statistic*>(a.rstd)[row] = Statistic(rstd);
}

// Everything of dtype T, weights of dtype W, every row in packs: x stays in registers as it was read.
// Grid: rows / blockDim.y clusters; a block holds blockDim.y rows, or one chunk of a row.
template <class T, class W>
__global__ void __launch_bounds__(kMaxThreads, 2)
norm_forward(const NormForward a, const int cluster, const bool centred) {
  using C = Compute<T>;
  constexpr int E = kElements<T>;
  using X = Pack<T, E>;
  const int chunk = blockIdx.x % cluster;
  const int64_t row = int64_t(blockIdx.x / cluster) * blockDim.y + threadIdx.y;
  const Columns<E> columns(chunk, row < a.rows ? a.cols : 0);
  if (cluster > 1) cluster_arrive();

  X x[kPacks];
  const T* input = static_cast<const T*>(a.input) + row * a.input_stride;
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (columns.has(k)) x[k] = X::load(input + columns.at(k));
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    T* summed = static_cast<T*>(a.summed) + row * a.cols;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!columns.has(k)) continue;
      C value[E], addend[E];
      x[k].unpack(value);
      X::load(residual + columns.at(k)).unpack(addend);
#pragma unroll
      for (int e = 0; e < E; ++e) value[e] += addend[e];
      x[k] = X::of(value);
      x[k].store(summed + columns.at(k));
    }
  }

  if (cluster > 1) cluster_wait();
  RowSum<C, 2> row_sum(cluster);
  C mean = 0, total[2] = {0, 0};
  if (centred) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!columns.has(k)) continue;
      C value[E];
      x[k].unpack(value);
#pragma unroll
      for (int e = 0; e < E; ++e) total[0] += value[e];
    }
    row_sum(total);
    mean = total[0] / C(a.cols);
    total[0] = 0;
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (!columns.has(k)) continue;
    C value[E];
    x[k].unpack(value);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      total[0] = fma(value[e] - mean, value[e] - mean, total[0]);
      total[1] += value[e] - mean;
    }
  }
  row_sum(total);
  if (centred) mean += total[1] / C(a.cols);  // what rounding took from the first sum, if the row lies far from zero
  const C rstd = C(1) / sqrt(total[0] / C(a.cols) + C(a.eps));
  if (columns.has(0) && columns.first == 0) store_statistics<C>(a, row, mean, rstd);

  T* out = static_cast<T*>(a.out) + row * a.cols;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (!columns.has(k)) continue;
    Pack<W, E> weight{}, bias{};
    if (a.weight) weight = Pack<W, E>::load(static_cast<const W*>(a.weight) + columns.at(k));
    if (a.bias) bias = Pack<W, E>::load(static_cast<const W*>(a.bias) + columns.at(k));
    C value[E], w[E], b[E];
    x[k].unpack(value);
    weight.unpack(w);
    bias.unpack(b);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      value[e] = (value[e] - mean) * rstd;
      const C scale = a.weight ? w[e] + C(a.weight_offset) : C(1);
      value[e] = a.bias ? fma(value[e], scale, b[e]) : value[e] * scale;
    }
    X::of(value).store(out + columns.at(k));
  }
}

// Every dtype, any address, stride and length; the same sums in the same order. With `staged` a thread keeps its part
// of x in shared memory, element by element across the threads (no bank conflicts); else it reads it again.
template <class C, int E>
__global__ void __launch_bounds__(kMaxThreads, 2)
norm_forward_any(const NormForward a, const int64_t chunks, const bool staged, const bool centred) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t cols = row < a.rows ? a.cols : 0;
  const int threads = blockDim.x * blockDim.y;
  C* const stage = reinterpret_cast<C*>(dynamic_shared) + threadIdx.y * blockDim.x + threadIdx.x;
  const void* const x = a.residual ? a.summed : a.input;
  const DType x_dtype = a.residual ? a.summed_dtype : a.input_dtype;
  const int64_t x_begin = row * (a.residual ? a.cols : a.input_stride);

  const auto column = [&](int64_t pack) { return (pack * blockDim.x + threadIdx.x) * E; };
  const auto count = [&](int64_t col) { return int(min(int64_t(E), cols - col)); };
  const auto keep = [&](int64_t pack, const C(&value)[E]) {
#pragma unroll
    for (int e = 0; e < E; ++e) stage[(pack * E + e) * threads] = value[e];
  };
  const auto load = [&](C(&value)[E], int64_t pack, int64_t col) {
    if (!staged) return load_any(value, x, x_dtype, x_begin + col, count(col));
#pragma unroll
    for (int e = 0; e < E; ++e) value[e] = stage[(pack * E + e) * threads];
  };

  if (staged || a.residual) {
    for (int64_t pack = 0, col = column(0); col < cols; col = column(++pack)) {
      C value[E];
      load_any(value, a.input, a.input_dtype, row * a.input_stride + col, count(col));
      if (a.residual) {
        C addend[E];
        load_any(addend, a.residual, a.residual_dtype, row * a.residual_stride + col, count(col));
#pragma unroll
        for (int e = 0; e < E; ++e) value[e] = round_to(x_dtype, value[e] + addend[e]);
        store_any(a.summed, x_dtype, x_begin + col, value, count(col));
      }
      if (staged) keep(pack, value);
    }
  }

  RowSum<C, 2> row_sum(1);
  const auto sum_over_row = [&](C(&total)[2], const auto& add) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      C part[2] = {0, 0};
      for (int64_t pack = chunk * kPacks; pack < (chunk + 1) * kPacks && column(pack) < cols; ++pack) {
        C value[E];
        load(value, pack, column(pack));
        const int n = count(column(pack));
#pragma unroll
        for (int e = 0; e < E; ++e)
          if (e < n) add(part, value[e]);
      }
      row_sum(part);
      total[0] += part[0];
      total[1] += part[1];
    }
  };
  C mean = 0, sum[2] = {0, 0}, total[2] = {0, 0};
  if (centred) {
    sum_over_row(sum, [](C(&part)[2], C value) { part[0] += value; });
    mean = sum[0] / C(a.cols);
  }
  sum_over_row(total, [&](C(&part)[2], C value) {
    part[0] = fma(value - mean, value - mean, part[0]);
    part[1] += value - mean;
  });
  if (centred) mean += total[1] / C(a.cols);
  const C rstd = C(1) / sqrt(total[0] / C(a.cols) + C(a.eps));
  if (threadIdx.x == 0 && cols > 0)
    x_dtype == DType::float64 ? store_statistics<double>(a, row, mean, rstd)
                              : store_statistics<float>(a, row, mean, rstd);

  for (int64_t pack = 0, col = column(0); col < cols; col = column(++pack)) {
    C value[E], w[E], b[E];
    load(value, pack, col);
    if (a.weight) load_any(w, a.weight, a.weight_dtype, col, count(col));
    if (a.bias) load_any(b, a.bias, a.weight_dtype, col, count(col));
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const C scale = a.weight ? w[e] + C(a.weight_offset) : C(1);
      value[e] = (value[e] - mean) * rstd;
      value[e] = a.bias ? fma(value[e], scale, b[e]) : value[e] * scale;
    }
    store_any(a.out, a.out_dtype, row * a.cols + col, value, count(col));
  }
}

}  // namespace bigmodel::cuda
