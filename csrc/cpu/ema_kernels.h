// What csrc/cpu/ema.cpp asks of csrc/cpu/ema.isa.cpp: the average of one chunk, both streams in the compute type.
#pragma once

#include "../ops/ema.h"
#include "isa.h"

namespace bigmodel::cpu {

struct EmaTable {
  void (*update[2])(void* const* stream, int64_t n, double one_less_decay);  // by compute type: float, double
};

BIGMODEL_ISA_TABLE(EmaTable, ema_table)

}  // namespace bigmodel::cpu
