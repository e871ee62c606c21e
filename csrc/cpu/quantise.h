// How float32 values in the first-level cache become 8-bit codes and back, and 16 bits by stochastic rounding.
// Formulas: csrc/ops/adam.h.
#pragma once

#include "../table.h"
#include "isa.h"

namespace bigmodel::cpu {

struct QuantiseTable {
  // values[0, n) = the value of each code, times the scale of its block of kQuantBlock.
  void (*load_codes)(float* values, const uint8_t* codes, const float* scales, int64_t n, bool is_signed);
  // The largest magnitude of each block into scales, and the code nearest to each quotient.
  void (*store_codes)(uint8_t* codes, float* scales, const float* values, int64_t n, bool is_signed);
  // to[i] = one of the two 16-bit neighbours of from[i], by random bits of (key, begin + i); all of one key (random.h).
  void (*round_stochastically[kDTypes])(void* to, const float* from, int64_t n, uint64_t key, int64_t begin);
};

BIGMODEL_ISA_TABLE(QuantiseTable, quantise_table)

}  // namespace bigmodel::cpu
