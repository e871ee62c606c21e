// Sums and scaling of gradients over one chunk, for one instruction set. Formulas: csrc/ops/grad_norm.h.
#include "grad_norm_kernels.h"
#include "vec.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

template <class T> BIGMODEL_INLINE Pack<T> magnitude(Pack<T> v) { return maximum(v, Pack<T>{} - v); }

template <class S, int power>
double total(const void* values_, int64_t n) {
  using T = Compute<S>;
  auto* values = static_cast<const S*>(values_);
  double sum = 0;
  pieces<T>(n, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    Accumulator<T> part;
    sweep<T>(count, [&](int64_t i, auto at, int k) __attribute__((always_inline)) {
      Pack<T> value = at.load(values + begin + i);
      part.part[k] += power == 1 ? magnitude(value) : value * value;
    });
    sum += part.sum();
  });
  return sum;
}

template <class S>
double largest(const void* values_, int64_t n) {
  using T = Compute<S>;
  auto* values = static_cast<const S*>(values_);
  Pack<T> most[2] = {};
  sweep<T>(n, [&](int64_t i, auto at, int k)
                  __attribute__((always_inline)) { most[k] = maximum(most[k], magnitude(at.load(values + i))); });
  const Pack<T> both = maximum(most[0], most[1]);
  const Vec<T> lanes = maximum<T>(both.lo, both.hi);
  T found = 0;
  for (int i = 0; i < kLanes<T>; ++i) found = found > lanes[i] || found != found ? found : lanes[i];
  return found;
}

template <class T>
void scale(void* const* stream, int64_t n, double factor) {
  auto* grad = static_cast<T*>(stream[kGradValue]);
  const Pack<T> all = splat(T(factor));
  sweep<T>(
      n, [=](int64_t i, auto at, int) __attribute__((always_inline)) { at.store(grad + i, at.load(grad + i) * all); });
}

}  // namespace

const GradNormTable grad_norm_table = {{{largest<float>, largest<BFloat16>, largest<Float16>, largest<double>},
                                        {total<float, 1>, total<BFloat16, 1>, total<Float16, 1>, total<double, 1>},
                                        {total<float, 2>, total<BFloat16, 2>, total<Float16, 2>, total<double, 2>}},
                                       {scale<float>, scale<double>}};

}  // namespace bigmodel::cpu::BIGMODEL_ISA
