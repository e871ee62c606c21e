// Moving averages on the CPU: one pass over memory, 12 bytes per element in float32. The arithmetic is in ema.isa.cpp.
#include "../ops/ema.h"

#include "ema_kernels.h"
#include "multi_tensor.h"

namespace bigmodel::cpu {
namespace {

constexpr Use kUses[kEmaStreams] = {
    {true, true, false},   // average
    {true, false, false},  // value
};

}  // namespace

void ema(const Ema& a, Exec exec) {
  const EmaTable& kernels = ema_table();
  update(a.table, kUses, kEmaStreams, exec.index,
         [&](const Chunk& chunk) { kernels.update[chunk.wide](chunk.stream, chunk.n, 1 - a.decay); });
}

}  // namespace bigmodel::cpu
