// Adagrad on the CPU: one pass over memory. The arithmetic is in adagrad.isa.cpp, the formulas are in ops/adagrad.h.
// Bytes per parameter in float32: 20.
#include "../ops/adagrad.h"

#include "adagrad_kernels.h"
#include "multi_tensor.h"

namespace bigmodel::cpu {
namespace {

constexpr Use kUses[kAdagradChunkStreams] = {
    {true, true, false},   // param
    {true, false, false},  // grad
    {true, true, false},   // sum
};

}  // namespace

void adagrad(const Adagrad& a, Exec exec) {
  if (found_inf(a.control)) return;
  const double factor = gradient_factor(a.control), lr = value_of(a.lr);
  std::vector<AdagradScalars> scalars(a.table.rows);
  for (int64_t row = 0; row < a.table.rows; ++row) {
    const double step = advance(a.table, row, kAdagradStep);
    scalars[row] = {factor, a.weight_decay, lr / (1 + (step - 1) * a.lr_decay), a.eps};
  }
  const AdagradTable& kernels = adagrad_table();
  update(a.table, kUses, 1, exec.index,
         [&](const Chunk& chunk) { kernels.update[chunk.wide](chunk.stream, chunk.n, scalars[chunk.row]); });
}

}  // namespace bigmodel::cpu
