// What csrc/cpu/adam.cpp asks of csrc/cpu/adam.isa.cpp: the update of one chunk.
#pragma once

#include "../ops/adam.h"
#include "isa.h"

namespace bigmodel::cpu {

// The streams that a kernel sees; steps and scales are the driver's.
constexpr int kAdamChunkStreams = kAdamStep;

struct AdamScalars {
  double factor;  // of the gradient
  double decay;   // what the weight is multiplied by: 1 - lr * weight_decay, or 1
  double l2;      // of the weight, added to the gradient
  double one_less_beta1, beta2, one_less_beta2;
  double step_size;   // lr / (1 - beta1^step)
  double root_scale;  // 1 / sqrt(1 - beta2^step)
  double eps, one_less_ema_decay;
};

// By the dtypes of param and grad: float64 only together, the others in any mix; the other streams are of the compute
// type.
struct AdamTable {
  void (*update[kDTypes][kDTypes])(void* const* stream, int64_t n, const AdamScalars& scalars);
  // Reads and writes the same streams, and leaves every value as it was.
  void (*touch[kDTypes][kDTypes])(void* const* stream, int64_t n);
};

BIGMODEL_ISA_TABLE(AdamTable, adam_table)

}  // namespace bigmodel::cpu
