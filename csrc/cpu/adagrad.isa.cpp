// The Adagrad update of one chunk, for one instruction set. Formulas: csrc/ops/adagrad.h.
#include "adagrad_kernels.h"
#include "vec.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

template <class T>
void update(void* const* stream, int64_t n, const AdagradScalars& scalars) {
  auto* grad = static_cast<const T*>(stream[kAdagradGrad]);
  auto *param = static_cast<T*>(stream[kAdagradParam]), *sum = static_cast<T*>(stream[kAdagradSum]);
  auto all = [](double value) __attribute__((always_inline)) { return splat(T(value)); };
  const Pack<T> factor = all(scalars.factor), weight_decay = all(scalars.weight_decay), rate = all(scalars.rate);
  const Pack<T> eps = all(scalars.eps);
  const bool decays = scalars.weight_decay != 0;
  sweep<T>(n, [=](int64_t i, auto at, int) __attribute__((always_inline)) {
    Pack<T> w = at.load(param + i), g = at.load(grad + i) * factor;
    if (decays) g += weight_decay * w;
    Pack<T> total = at.load(sum + i) + g * g;
    at.store(sum + i, total);
    at.store(param + i, w - rate * (g / (square_root(total) + eps)));
  });
}

}  // namespace

const AdagradTable adagrad_table = {{update<float>, update<double>}};

}  // namespace bigmodel::cpu::BIGMODEL_ISA
