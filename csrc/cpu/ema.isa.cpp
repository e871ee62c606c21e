// The moving average of one chunk, for one instruction set. Formula: csrc/ops/ema.h.
#include "ema_kernels.h"
#include "vec.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

template <class T>
void update(void* const* stream, int64_t n, double one_less_decay) {
  auto* average = static_cast<T*>(stream[kEmaAverage]);
  auto* value = static_cast<const T*>(stream[kEmaValue]);
  const Pack<T> share = splat(T(one_less_decay));
  sweep<T>(n, [=](int64_t i, auto at, int) __attribute__((always_inline)) {
    Pack<T> old = at.load(average + i);
    at.store(average + i, old + share * (at.load(value + i) - old));
  });
}

}  // namespace

const EmaTable ema_table = {{update<float>, update<double>}};

}  // namespace bigmodel::cpu::BIGMODEL_ISA
