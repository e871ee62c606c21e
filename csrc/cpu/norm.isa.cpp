// Normalisation over one chunk of a row, for one instruction set. Formulas: csrc/ops/norm.h.
//
// A chunk is read from memory once by the first kernel and found in the cache by the second, so the passes over it cost
// arithmetic only. Per element of a chunk: forward 2 loads, 1 store; backward 4 loads (x, grad_out, twice), weight and
// grad_weight from the cache, 1 store.
#include "norm_kernels.h"
#include "vec.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

#define BIGMODEL_BODY(...) [&](__VA_ARGS__) __attribute__((always_inline))

template <class S, bool centred>
Moments moments(const void* x_, int64_t n) {
  using T = Compute<S>;
  auto* x = static_cast<const S*>(x_);
  double mean = 0, square = 0;
  if constexpr (centred) {
    pieces<T>(n, BIGMODEL_BODY(int64_t begin, int64_t count) {
      Accumulator<T> total;
      sweep<T>(count, BIGMODEL_BODY(int64_t i, auto at, int k) { total.part[k] += at.load(x + begin + i); });
      mean += total.sum();
    });
    mean /= double(n);
  }
  Pack<T> centre = splat(T(mean));
  pieces<T>(n, BIGMODEL_BODY(int64_t begin, int64_t count) {
    Accumulator<T> total;
    sweep<T>(count, BIGMODEL_BODY(int64_t i, auto at, int k) {
      Pack<T> d = centred ? at.keep(at.load(x + begin + i) - centre) : at.load(x + begin + i);
      total.part[k] += d * d;
    });
    square += total.sum();
  });
  return {mean, square};
}

template <class S, bool centred, bool streaming>
void apply_to(const NormChunk& c) {
  using T = Compute<S>;
  auto* out = static_cast<S*>(c.out);
  auto *x = static_cast<const S*>(c.x), *next_x = static_cast<const S*>(c.next_x);
  auto *weight = static_cast<const T*>(c.weight), *bias = static_cast<const T*>(c.bias);
  Pack<T> mean = splat(T(c.mean)), rstd = splat(T(c.rstd));
  sweep<T>(c.n, BIGMODEL_BODY(int64_t i, auto at, int) {
    fetch<T>(next_x + i);
    Pack<T> y =
        centred ? (at.load(x + i) - mean) * rstd * at.load(weight + i) : at.load(x + i) * rstd * at.load(weight + i);
    if constexpr (centred) y += at.load(bias + i);
    at.template put_at<streaming>(out + i, y);
  });
}

template <class S, bool centred>
void apply(const NormChunk& c) {
  c.streaming ? apply_to<S, centred, true>(c) : apply_to<S, centred, false>(c);
}

// A row's xhat from x, or from the output; where a weight is 0 the output says nothing about xhat, and 0 is taken.
template <class S, bool centred, bool from_output>
struct Normalised {
  using T = Compute<S>;
  const S* saved;
  const T *weight, *bias;
  Pack<T> mean, rstd;
  BIGMODEL_INLINE Normalised(const NormGradChunk& c, const NormGradRow& row)
      : saved(static_cast<const S*>(row.saved)), weight(static_cast<const T*>(c.weight)),
        bias(static_cast<const T*>(c.bias)), mean(splat(T(row.mean))), rstd(splat(T(row.rstd))) {}
  template <class At>
  BIGMODEL_INLINE Pack<T> at(int64_t i, At at) const {
    Pack<T> value = at.load(saved + i);
    if constexpr (from_output) {
      if constexpr (centred) value -= at.load(bias + i);
      return divide_or_zero(value, at.load(weight + i));
    } else {
      return centred ? (value - mean) * rstd : value * rstd;
    }
  }
};

template <class S, bool centred, bool from_output>
GradSums grad_sums_of(const NormGradChunk& c, const NormGradRow& row) {
  using T = Compute<S>;
  auto* grad_out = static_cast<const S*>(row.grad_out);
  auto* weight = static_cast<const T*>(c.weight);
  Normalised<S, centred, from_output> xhat(c, row);
  GradSums sums{};
  pieces<T>(c.n, BIGMODEL_BODY(int64_t begin, int64_t count) {
    Accumulator<T> sum_g, sum_g_xhat;
    sweep<T>(count, BIGMODEL_BODY(int64_t i, auto at, int k) {
      Pack<T> g = at.load(grad_out + begin + i) * at.load(weight + begin + i);
      if constexpr (centred) sum_g.part[k] += g;
      sum_g_xhat.part[k] += g * xhat.at(begin + i, at);
    });
    sums.g += sum_g.sum();
    sums.g_xhat += sum_g_xhat.sum();
  });
  return sums;
}

template <class S, bool centred>
GradSums grad_sums(const NormGradChunk& c, const NormGradRow& row) {
  return c.from_output ? grad_sums_of<S, centred, true>(c, row) : grad_sums_of<S, centred, false>(c, row);
}

template <class S, bool centred, bool from_output>
struct GradRow {
  using T = Compute<S>;
  Normalised<S, centred, from_output> normalised;
  const S *grad_out, *grad_summed, *next_grad_out, *next_saved;
  S* grad_x;
  Pack<T> rstd, mean_g, mean_g_xhat;
  BIGMODEL_INLINE GradRow(const NormGradChunk& c, const NormGradRow& row)
      : normalised(c, row), grad_out(static_cast<const S*>(row.grad_out)),
        grad_summed(static_cast<const S*>(row.grad_summed)), next_grad_out(static_cast<const S*>(row.next_grad_out)),
        next_saved(static_cast<const S*>(row.next_saved)), grad_x(static_cast<S*>(row.grad_x)),
        rstd(splat(T(row.rstd))), mean_g(splat(T(row.mean_g))), mean_g_xhat(splat(T(row.mean_g_xhat))) {}
  // Stores grad_x, and adds this row's part of the weight gradients.
  template <bool summed, bool streaming, class At>
  BIGMODEL_INLINE void step(int64_t i, At at, Pack<T> weight, Pack<T>& grad_weight, Pack<T>& grad_bias) const {
    fetch<T>(next_grad_out + i);
    fetch<T>(next_saved + i);
    Pack<T> xhat = normalised.at(i, at), dy = at.load(grad_out + i);
    Pack<T> g = dy * weight - xhat * mean_g_xhat;
    if constexpr (centred) g -= mean_g;
    g *= rstd;
    if constexpr (summed) g += at.load(grad_summed + i);
    at.template put_at<streaming>(grad_x + i, g);
    grad_weight += dy * xhat;
    if constexpr (centred) grad_bias += dy;
  }
};

template <class S, bool centred, bool from_output, bool summed, bool weighted>
void grad_apply_one(const NormGradChunk& c, const NormGradRow& only) {
  using T = Compute<S>;
  auto* weight = static_cast<const T*>(c.weight);
  auto *grad_weight = static_cast<T*>(c.grad_weight), *grad_bias = static_cast<T*>(c.grad_bias);
  GradRow<S, centred, from_output> row(c, only);
  sweep<T>(c.n, BIGMODEL_BODY(int64_t i, auto at, int) {
    Pack<T> dw{}, db{};
    if constexpr (weighted) dw = at.load(grad_weight + i);
    if constexpr (weighted && centred) db = at.load(grad_bias + i);
    row.template step<summed, false>(i, at, at.load(weight + i), dw, db);
    if constexpr (weighted) at.store(grad_weight + i, dw);
    if constexpr (weighted && centred) at.store(grad_bias + i, db);
  });
}

template <class S, bool centred, bool summed, bool streaming>
void grad_apply_two(const NormGradChunk& c, const NormGradRow* rows) {
  using T = Compute<S>;
  auto* weight = static_cast<const T*>(c.weight);
  auto *grad_weight = static_cast<T*>(c.grad_weight), *grad_bias = static_cast<T*>(c.grad_bias);
  GradRow<S, centred, false> first(c, rows[0]), second(c, rows[1]);
  sweep<T>(c.n, BIGMODEL_BODY(int64_t i, auto at, int) {
    Pack<T> w = at.load(weight + i), dw = at.load(grad_weight + i), db{};
    if constexpr (centred) db = at.load(grad_bias + i);
    first.template step<summed, streaming>(i, at, w, dw, db);
    second.template step<summed, streaming>(i, at, w, dw, db);
    at.store(grad_weight + i, dw);
    if constexpr (centred) at.store(grad_bias + i, db);
  });
}

template <class S, bool centred, bool from_output>
void grad_apply_each(const NormGradChunk& c, const NormGradRow& row) {
  if (row.grad_summed)
    c.grad_weight ? grad_apply_one<S, centred, from_output, true, true>(c, row)
                  : grad_apply_one<S, centred, from_output, true, false>(c, row);
  else
    c.grad_weight ? grad_apply_one<S, centred, from_output, false, true>(c, row)
                  : grad_apply_one<S, centred, from_output, false, false>(c, row);
}

template <class S, bool centred>
void grad_apply(const NormGradChunk& c, const NormGradRow* rows, int count) {
  if (count == 2 && c.grad_weight && !c.from_output) {
    if (rows->grad_summed)
      return c.streaming ? grad_apply_two<S, centred, true, true>(c, rows)
                         : grad_apply_two<S, centred, true, false>(c, rows);
    return c.streaming ? grad_apply_two<S, centred, false, true>(c, rows)
                       : grad_apply_two<S, centred, false, false>(c, rows);
  }
  for (int i = 0; i < count; ++i)
    c.from_output ? grad_apply_each<S, centred, true>(c, rows[i]) : grad_apply_each<S, centred, false>(c, rows[i]);
}

template <class S, bool centred>
constexpr NormKernels kernels{moments<S, centred>, apply<S, centred>, grad_sums<S, centred>, grad_apply<S, centred>};

}  // namespace

const NormTable norm_table = {
    {kernels<float, true>, kernels<BFloat16, true>, kernels<Float16, true>, kernels<double, true>},
    {kernels<float, false>, kernels<BFloat16, false>, kernels<Float16, false>, kernels<double, false>}};

}  // namespace bigmodel::cpu::BIGMODEL_ISA
