// The Adam update of one chunk, for one instruction set. Formulas: csrc/ops/adam.h.
#include "adam_kernels.h"
#include "vec.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

template <class T> struct Streams {
  T *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *master, *ema;
  BIGMODEL_INLINE explicit Streams(void* const* stream)
      : exp_avg(static_cast<T*>(stream[kAdamExpAvg])), exp_avg_sq(static_cast<T*>(stream[kAdamExpAvgSq])),
        max_exp_avg_sq(static_cast<T*>(stream[kAdamMaxExpAvgSq])), master(static_cast<T*>(stream[kAdamMaster])),
        ema(static_cast<T*>(stream[kAdamEma])) {}
};

template <class P, class G>
void update(void* const* stream, int64_t n, const AdamScalars& scalars) {
  using T = Compute<P>;
  auto* param = static_cast<P*>(stream[kAdamParam]);
  auto* grad = static_cast<const G*>(stream[kAdamGrad]);
  const Streams<T> of(stream);
  auto all = [](double value) __attribute__((always_inline)) { return splat(T(value)); };
  const Pack<T> factor = all(scalars.factor), decay = all(scalars.decay), l2 = all(scalars.l2);
  const Pack<T> one_less_beta1 = all(scalars.one_less_beta1), beta2 = all(scalars.beta2);
  const Pack<T> one_less_beta2 = all(scalars.one_less_beta2), step_size = all(scalars.step_size);
  const Pack<T> root_scale = all(scalars.root_scale), eps = all(scalars.eps);
  const Pack<T> one_less_ema_decay = all(scalars.one_less_ema_decay);
  const bool adds_weight = scalars.l2 != 0;
  sweep<T>(n, [=](int64_t i, auto at, int) __attribute__((always_inline)) {
    Pack<T> w = of.master ? at.load(of.master + i) : at.load(param + i), g = at.load(grad + i) * factor;
    if (adds_weight) g += l2 * w;
    Pack<T> m = at.load(of.exp_avg + i), v = at.load(of.exp_avg_sq + i);
    m += one_less_beta1 * (g - m);
    v = beta2 * v + one_less_beta2 * (g * g);
    at.store(of.exp_avg + i, m);
    at.store(of.exp_avg_sq + i, v);
    if (of.max_exp_avg_sq) {
      v = maximum(at.load(of.max_exp_avg_sq + i), v);
      at.store(of.max_exp_avg_sq + i, v);
    }
    w = w * decay - step_size * (m / (square_root(v) * root_scale + eps));
    if (of.ema) {
      const Pack<T> average = at.load(of.ema + i);
      at.store(of.ema + i, average + one_less_ema_decay * (w - average));
    }
    if (of.master) at.store(of.master + i, w);
    at.store(param + i, w);
  });
}

// Every stream is read and, but for the gradient, written with its own value: `never` is true in no lane. All are read
// before the first is written, as in the update.
template <class P, class G>
void touch(void* const* stream, int64_t n) {
  using T = Compute<P>;
  auto* param = static_cast<P*>(stream[kAdamParam]);
  auto* grad = static_cast<const G*>(stream[kAdamGrad]);
  const Streams<T> of(stream);
  volatile T zero = 0;
  const auto never = splat(T(zero)).lo != Vec<T>{};
  sweep<T>(n, [=](int64_t i, auto at, int) __attribute__((always_inline)) {
    const Pack<T> g = at.load(grad + i);
    auto read = [=](auto* values) __attribute__((always_inline)) {
      const Pack<T> v = values ? at.load(values + i) : g;
      return Pack<T>{never ? g.lo : v.lo, never ? g.hi : v.hi};
    };
    const Pack<T> w = read(param), m = read(of.exp_avg), v = read(of.exp_avg_sq);
    const Pack<T> most = read(of.max_exp_avg_sq), master = read(of.master), ema = read(of.ema);
    at.store(of.exp_avg + i, m);
    at.store(of.exp_avg_sq + i, v);
    if (of.max_exp_avg_sq) at.store(of.max_exp_avg_sq + i, most);
    if (of.ema) at.store(of.ema + i, ema);
    if (of.master) at.store(of.master + i, master);
    at.store(param + i, w);
  });
}

}  // namespace

#define BIGMODEL_MIXES(kernel)                                                                     \
  {                                                                                                \
    {kernel<float, float>, kernel<float, BFloat16>, kernel<float, Float16>, nullptr},              \
        {kernel<BFloat16, float>, kernel<BFloat16, BFloat16>, kernel<BFloat16, Float16>, nullptr}, \
        {kernel<Float16, float>, kernel<Float16, BFloat16>, kernel<Float16, Float16>, nullptr}, {  \
      nullptr, nullptr, nullptr, kernel<double, double>                                            \
    }                                                                                              \
  }
const AdamTable adam_table = {BIGMODEL_MIXES(update), BIGMODEL_MIXES(touch)};
#undef BIGMODEL_MIXES

}  // namespace bigmodel::cpu::BIGMODEL_ISA
