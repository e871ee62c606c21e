// What csrc/cpu/grad_norm.cpp asks of csrc/cpu/grad_norm.isa.cpp: sums over one chunk of any dtype, and its scaling.
#pragma once

#include "../ops/grad_norm.h"
#include "isa.h"

namespace bigmodel::cpu {

struct GradNormTable {
  double (*total[3][kDTypes])(const void* values, int64_t n);       // by power: max |g|, sum |g|, sum g^2
  void (*scale[2])(void* const* stream, int64_t n, double factor);  // by compute type: float, double
};

BIGMODEL_ISA_TABLE(GradNormTable, grad_norm_table)

}  // namespace bigmodel::cpu
