// What csrc/cpu/sgd.cpp asks of csrc/cpu/sgd.isa.cpp: the update of one chunk, all streams in the compute type.
#pragma once

#include "../ops/sgd.h"
#include "isa.h"

namespace bigmodel::cpu {

constexpr int kSgdChunkStreams = kSgdStarted;  // the streams that a kernel sees

struct SgdScalars {
  double factor;  // of the gradient
  double weight_decay, lr;
  double kept, added;  // the buffer becomes kept * buffer + added * g
  double ahead;        // of the buffer, added to `own` * g for the step
  double own;
};

struct SgdTable {
  void (*update[2])(void* const* stream, int64_t n, const SgdScalars& scalars);  // by compute type: float, double
};

BIGMODEL_ISA_TABLE(SgdTable, sgd_table)

}  // namespace bigmodel::cpu
