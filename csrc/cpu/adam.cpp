// Adam on the CPU: one pass over memory for all tensors of a group. The arithmetic is in adam.isa.cpp, the formulas are
// in ops/adam.h, how chunks are cut and converted is in multi_tensor.h.
//
// Bytes per parameter in float32: read param, grad, exp_avg, exp_avg_sq and write all but grad, 28; an EMA adds 8,
// amsgrad 8. bfloat16 parameter and gradient with a float32 master: 28 too. 8-bit states: 16.
#include "../ops/adam.h"

#include <cmath>

#include "adam_kernels.h"
#include "multi_tensor.h"

namespace bigmodel::cpu {
namespace {

constexpr Use kUses[kAdamChunkStreams] = {
    {true, true, true},                              // param
    {true, false, true},                             // grad
    {true, true, false, kAdamExpAvgScale, true},     // exp_avg
    {true, true, false, kAdamExpAvgSqScale, false},  // exp_avg_sq
    {true, true, false},                             // max_exp_avg_sq
    {true, true, false},                             // master
    {true, true, false},                             // ema
};

AdamScalars scalars_at(const Adam& a, double factor, double lr, double step) {
  AdamScalars s;
  s.factor = factor;
  s.decay = a.decoupled ? 1 - lr * a.weight_decay : 1;
  s.l2 = a.decoupled ? 0 : a.weight_decay;
  s.one_less_beta1 = 1 - a.beta1;
  s.beta2 = a.beta2;
  s.one_less_beta2 = 1 - a.beta2;
  s.step_size = lr / (1 - std::pow(a.beta1, step));
  s.root_scale = 1 / std::sqrt(1 - std::pow(a.beta2, step));
  s.eps = a.eps;
  s.one_less_ema_decay = 1 - a.ema_decay;
  return s;
}

template <class Kernel>
Kernel kernel_of(const Kernel (&kernels)[kDTypes][kDTypes], const Chunk& chunk) {
  return kernels[int(chunk.dtype[kAdamParam])][int(chunk.dtype[kAdamGrad])];
}

}  // namespace

void adam(const Adam& a, Exec exec) {
  if (found_inf(a.control)) return;
  const double factor = gradient_factor(a.control), lr = value_of(a.lr);
  std::vector<AdamScalars> scalars(a.table.rows);
  Stochastic stochastic;
  if (a.stochastic) stochastic = {kAdamParam, a.seed, std::vector<int64_t>(a.table.rows)};
  double last = -1;
  for (int64_t row = 0; row < a.table.rows; ++row) {
    const double step = advance(a.table, row, kAdamStep);
    scalars[row] = step == last ? scalars[row - 1] : scalars_at(a, factor, lr, step);
    last = step;
    if (a.stochastic) stochastic.steps[row] = int64_t(step);
  }
  const AdamTable& kernels = adam_table();
  update(
      a.table, kUses, 1, exec.index,
      [&](const Chunk& chunk) { kernel_of(kernels.update, chunk)(chunk.stream, chunk.n, scalars[chunk.row]); },
      stochastic);
}

void adam_touch(const Table& table, Exec exec) {
  const AdamTable& kernels = adam_table();
  update(table, kUses, 1, exec.index,
         [&](const Chunk& chunk) { kernel_of(kernels.touch, chunk)(chunk.stream, chunk.n); });
}

}  // namespace bigmodel::cpu
