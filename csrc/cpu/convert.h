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

#define BIGMODEL_DECLARE(isa)              \
  namespace isa {                          \
  extern const ConvertTable convert_table; \
  }
BIGMODEL_FOR_EACH_ISA(BIGMODEL_DECLARE)
#undef BIGMODEL_DECLARE

inline const ConvertTable& convert_table() {
#define BIGMODEL_ENTRY(isa) &isa::convert_table,
  static const ConvertTable* const tables[] = {BIGMODEL_FOR_EACH_ISA(BIGMODEL_ENTRY)};
#undef BIGMODEL_ENTRY
  return *tables[isa_index()];
}

}  // namespace bigmodel::cpu
