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
  Vec<T> centre = splat(T(mean));
  pieces<T>(n, BIGMODEL_BODY(int64_t begin, int64_t count) {
    Accumulator<T> total;
    sweep<T>(count, BIGMODEL_BODY(int64_t i, auto at, int k) {
      Vec<T> d = centred ? at.keep(at.load(x + begin + i) - centre) : at.load(x + begin + i);
      total.part[k] += d * d;
    });
    square += total.sum();
  });
  return {mean, square};
}

template <class S, bool centred>
void apply(const NormChunk& c) {
  using T = Compute<S>;
  auto* out = static_cast<S*>(c.out);
  auto* x = static_cast<const S*>(c.x);
  auto *weight = static_cast<const T*>(c.weight), *bias = static_cast<const T*>(c.bias);
  Vec<T> mean = splat(T(c.mean)), rstd = splat(T(c.rstd));
  sweep<T>(c.n, BIGMODEL_BODY(int64_t i, auto at, int) {
    if constexpr (centred)
      at.store(out + i, (at.load(x + i) - mean) * rstd * at.load(weight + i) + at.load(bias + i));
    else
      at.store(out + i, at.load(x + i) * rstd * at.load(weight + i));
  });
}

// xhat from x, or from the output; where a weight is 0 the output says nothing about xhat, and 0 is taken.
template <class S, bool centred, bool from_output>
struct Normalised {
  using T = Compute<S>;
  const S* saved;
  const T *weight, *bias;
  Vec<T> mean, rstd;
  explicit BIGMODEL_INLINE Normalised(const NormGradChunk& c)
      : saved(static_cast<const S*>(c.saved)), weight(static_cast<const T*>(c.weight)),
        bias(static_cast<const T*>(c.bias)), mean(splat(T(c.mean))), rstd(splat(T(c.rstd))) {}
  template <class At>
  BIGMODEL_INLINE Vec<T> at(int64_t i, At at) const {
    Vec<T> value = at.load(saved + i);
    if constexpr (from_output) {
      if constexpr (centred) value -= at.load(bias + i);
      Vec<T> w = at.load(weight + i);
      return w == Vec<T>{} ? Vec<T>{} : value / w;
    } else {
      return centred ? (value - mean) * rstd : value * rstd;
    }
  }
};

template <class S, bool centred, bool from_output>
GradSums grad_sums_of(const NormGradChunk& c) {
  using T = Compute<S>;
  auto* grad_out = static_cast<const S*>(c.grad_out);
  auto* weight = static_cast<const T*>(c.weight);
  Normalised<S, centred, from_output> xhat(c);
  GradSums sums{};
  pieces<T>(c.n, BIGMODEL_BODY(int64_t begin, int64_t count) {
    Accumulator<T> sum_g, sum_g_xhat;
    sweep<T>(count, BIGMODEL_BODY(int64_t i, auto at, int k) {
      Vec<T> g = at.load(grad_out + begin + i) * at.load(weight + begin + i);
      if constexpr (centred) sum_g.part[k] += g;
      sum_g_xhat.part[k] += g * xhat.at(begin + i, at);
    });
    sums.g += sum_g.sum();
    sums.g_xhat += sum_g_xhat.sum();
  });
  return sums;
}

template <class S, bool centred>
GradSums grad_sums(const NormGradChunk& c) {
  return c.from_output ? grad_sums_of<S, centred, true>(c) : grad_sums_of<S, centred, false>(c);
}

template <class S, bool centred, bool from_output, bool summed, bool weighted>
void grad_apply_of(const NormGradChunk& c) {
  using T = Compute<S>;
  auto* grad_x = static_cast<S*>(c.grad_x);
  auto *grad_out = static_cast<const S*>(c.grad_out), *grad_summed = static_cast<const S*>(c.grad_summed);
  auto* weight = static_cast<const T*>(c.weight);
  auto *grad_weight = static_cast<T*>(c.grad_weight), *grad_bias = static_cast<T*>(c.grad_bias);
  Normalised<S, centred, from_output> normalised(c);
  Vec<T> mean_g = splat(T(c.mean_g)), mean_g_xhat = splat(T(c.mean_g_xhat)), rstd = splat(T(c.rstd));
  sweep<T>(c.n, BIGMODEL_BODY(int64_t i, auto at, int) {
    Vec<T> xhat = normalised.at(i, at), dy = at.load(grad_out + i);
    Vec<T> g = dy * at.load(weight + i) - xhat * mean_g_xhat;
    if constexpr (centred) g -= mean_g;
    g *= rstd;
    if constexpr (summed) g += at.load(grad_summed + i);
    at.store(grad_x + i, g);
    if constexpr (weighted) {
      at.store(grad_weight + i, at.load(grad_weight + i) + dy * xhat);
      if constexpr (centred) at.store(grad_bias + i, at.load(grad_bias + i) + dy);
    }
  });
}

template <class S, bool centred, bool from_output>
void grad_apply_with(const NormGradChunk& c) {
  if (c.grad_summed)
    c.grad_weight ? grad_apply_of<S, centred, from_output, true, true>(c)
                  : grad_apply_of<S, centred, from_output, true, false>(c);
  else
    c.grad_weight ? grad_apply_of<S, centred, from_output, false, true>(c)
                  : grad_apply_of<S, centred, from_output, false, false>(c);
}

template <class S, bool centred>
void grad_apply(const NormGradChunk& c) {
  c.from_output ? grad_apply_with<S, centred, true>(c) : grad_apply_with<S, centred, false>(c);
}

template <class S, bool centred>
constexpr NormKernels kernels{moments<S, centred>, apply<S, centred>, grad_sums<S, centred>, grad_apply<S, centred>};

}  // namespace

const NormTable norm_table = {
    {kernels<float, true>, kernels<BFloat16, true>, kernels<Float16, true>, kernels<double, true>},
    {kernels<float, false>, kernels<BFloat16, false>, kernels<Float16, false>, kernels<double, false>}};

}  // namespace bigmodel::cpu::BIGMODEL_ISA
