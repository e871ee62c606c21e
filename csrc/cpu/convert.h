// Conversions between dtypes over one chunk that lies in the first-level cache: how mixed-dtype calls reach kernels
// that are compiled for one dtype only.
#pragma once

#include "../op.h"
#include "isa.h"

namespace bigmodel::cpu {

// to[0, n) = from[0, n), rounded to nearest even.
using Convert = void (*)(void* to, const void* from, int64_t n);
// sum[0, n) = a[0, n) + b[0, n), all of one dtype, added in float (double) and rounded once.
using Add = void (*)(void* sum, const void* a, const void* b, int64_t n);

struct ConvertTable {
  Convert convert[kDTypes][kDTypes];  // [to][from]
  Add add[kDTypes];
};

BIGMODEL_ISA_TABLE(ConvertTable, convert_table)

}  // namespace bigmodel::cpu
