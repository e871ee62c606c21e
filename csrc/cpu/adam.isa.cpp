// The Adam update of one chunk, for one instruction set. Formulas: csrc/ops/adam.h.
#include "adam_kernels.h"
#include "vec.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

template <class T>
void update(void* const* stream, int64_t n, const AdamScalars& scalars) {
  auto* grad = static_cast<const T*>(stream[kAdamGrad]);
  auto *param = static_cast<T*>(stream[kAdamParam]), *master = static_cast<T*>(stream[kAdamMaster]);
  auto *exp_avg = static_cast<T*>(stream[kAdamExpAvg]), *exp_avg_sq = static_cast<T*>(stream[kAdamExpAvgSq]);
  auto *max_exp_avg_sq = static_cast<T*>(stream[kAdamMaxExpAvgSq]), *ema = static_cast<T*>(stream[kAdamEma]);
  auto all = [](double value) __attribute__((always_inline)) { return splat(T(value)); };
  const Pack<T> factor = all(scalars.factor), decay = all(scalars.decay), l2 = all(scalars.l2);
  const Pack<T> one_less_beta1 = all(scalars.one_less_beta1), beta2 = all(scalars.beta2);
  const Pack<T> one_less_beta2 = all(scalars.one_less_beta2), step_size = all(scalars.step_size);
  const Pack<T> root_scale = all(scalars.root_scale), eps = all(scalars.eps);
  const Pack<T> one_less_ema_decay = all(scalars.one_less_ema_decay);
  const bool adds_weight = scalars.l2 != 0;
  sweep<T>(n, [=](int64_t i, auto at, int) __attribute__((always_inline)) {
    Pack<T> w = at.load((master ? master : param) + i), g = at.load(grad + i) * factor;
    Pack<T> m = at.load(exp_avg + i), v = at.load(exp_avg_sq + i);
    if (adds_weight) g += l2 * w;
    m += one_less_beta1 * (g - m);
    v = beta2 * v + one_less_beta2 * (g * g);
    at.store(exp_avg + i, m);
    at.store(exp_avg_sq + i, v);
    if (max_exp_avg_sq) {
      v = maximum(at.load(max_exp_avg_sq + i), v);
      at.store(max_exp_avg_sq + i, v);
    }
    w = w * decay - step_size * (m / (square_root(v) * root_scale + eps));
    if (ema) {
      Pack<T> average = at.load(ema + i);
      at.store(ema + i, average + one_less_ema_decay * (w - average));
    }
    if (master) at.store(master + i, w);
    at.store(param + i, w);
  });
}

}  // namespace

const AdamTable adam_table = {{update<float>, update<double>}, {nullptr, nullptr}};

}  // namespace bigmodel::cpu::BIGMODEL_ISA
