// SGD on the CPU: one pass over memory. The arithmetic is in sgd.isa.cpp, the formulas are in ops/sgd.h.
// Bytes per parameter in float32: 12, with momentum 20.
#include "../ops/sgd.h"

#include "multi_tensor.h"
#include "sgd_kernels.h"

namespace bigmodel::cpu {
namespace {

constexpr Use kUses[kSgdChunkStreams] = {
    {true, true, false},   // param
    {true, false, false},  // grad
    {true, true, false},   // momentum
};

// Whether this is a row's first step; it no longer is afterwards.
bool start(const Table& table, int64_t row) {
  auto* started = static_cast<float*>(table.address(row, kSgdStarted));
  const bool first = started && *started == 0;
  if (started) *started = 1;
  return first;
}

}  // namespace

void sgd(const Sgd& a, Exec exec) {
  if (found_inf(a.control)) return;
  SgdScalars later{};
  later.factor = gradient_factor(a.control);
  later.weight_decay = a.weight_decay;
  later.lr = value_of(a.lr);
  later.kept = a.momentum;
  later.added = 1 - a.dampening;
  later.ahead = a.nesterov ? a.momentum : 1;
  later.own = a.nesterov ? 1 : 0;
  SgdScalars first = later;
  first.kept = 0;
  first.added = 1;
  std::vector<char> is_first(a.table.rows);
  for (int64_t row = 0; row < a.table.rows; ++row) is_first[row] = start(a.table, row);
  const SgdTable& kernels = sgd_table();
  update(a.table, kUses, 1, exec.index, [&](const Chunk& chunk) {
    kernels.update[chunk.wide](chunk.stream, chunk.n, is_first[chunk.row] ? first : later);
  });
}

}  // namespace bigmodel::cpu
