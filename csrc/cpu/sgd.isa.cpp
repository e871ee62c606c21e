// The SGD update of one chunk, for one instruction set. Formulas: csrc/ops/sgd.h.
#include "sgd_kernels.h"
#include "vec.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

template <class T>
void update(void* const* stream, int64_t n, const SgdScalars& scalars) {
  auto* grad = static_cast<const T*>(stream[kSgdGrad]);
  auto *param = static_cast<T*>(stream[kSgdParam]), *momentum = static_cast<T*>(stream[kSgdMomentum]);
  auto all = [](double value) __attribute__((always_inline)) { return splat(T(value)); };
  const Pack<T> factor = all(scalars.factor), weight_decay = all(scalars.weight_decay), lr = all(scalars.lr);
  const Pack<T> kept = all(scalars.kept), added = all(scalars.added);
  const Pack<T> ahead = all(scalars.ahead), own = all(scalars.own);
  const bool decays = scalars.weight_decay != 0, keeps = scalars.kept != 0, looks_ahead = scalars.own != 0;
  sweep<T>(n, [=](int64_t i, auto at, int) __attribute__((always_inline)) {
    Pack<T> w = at.load(param + i), g = at.load(grad + i) * factor;
    if (decays) g += weight_decay * w;
    if (momentum) {
      Pack<T> buffer = added * g;
      if (keeps) buffer += kept * at.load(momentum + i);  // in the first step it may hold anything
      at.store(momentum + i, buffer);
      g = looks_ahead ? own * g + ahead * buffer : buffer;
    }
    at.store(param + i, w - lr * g);
  });
}

}  // namespace

const SgdTable sgd_table = {{update<float>, update<double>}};

}  // namespace bigmodel::cpu::BIGMODEL_ISA
