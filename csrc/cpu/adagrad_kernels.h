// What csrc/cpu/adagrad.cpp asks of csrc/cpu/adagrad.isa.cpp: the update of one chunk, all streams in the compute type.
#pragma once

#include "../ops/adagrad.h"
#include "isa.h"

namespace bigmodel::cpu {

constexpr int kAdagradChunkStreams = kAdagradStep;  // the streams that a kernel sees

struct AdagradScalars {
  double factor;  // of the gradient
  double weight_decay;
  double rate;  // lr / (1 + (step - 1) * lr_decay)
  double eps;
};

struct AdagradTable {
  void (*update[2])(void* const* stream, int64_t n, const AdagradScalars& scalars);  // by compute type: float, double
};

BIGMODEL_ISA_TABLE(AdagradTable, adagrad_table)

}  // namespace bigmodel::cpu
