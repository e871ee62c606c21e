// What csrc/cpu/grad_norm.cpp asks of csrc/cpu/grad_norm.isa.cpp: sums over one chunk of any dtype, and its scaling.
#pragma once

#include "../ops/grad_norm.h"
#include "isa.h"

namespace bigmodel::cpu {

struct GradNormTable {
  double (*total[3][kDTypes])(const void* values, int64_t n);       // by power: max |g|, sum |g|, sum g^2
  void (*scale[2])(void* const* stream, int64_t n, double factor);  // by compute type: float, double
};

#define BIGMODEL_DECLARE(isa)                 \
  namespace isa {                             \
  extern const GradNormTable grad_norm_table; \
  }
BIGMODEL_FOR_EACH_ISA(BIGMODEL_DECLARE)
#undef BIGMODEL_DECLARE

inline const GradNormTable& grad_norm_table() {
#define BIGMODEL_ENTRY(isa) &isa::grad_norm_table,
  static const GradNormTable* const tables[] = {BIGMODEL_FOR_EACH_ISA(BIGMODEL_ENTRY)};
#undef BIGMODEL_ENTRY
  return *tables[isa_index()];
}

}  // namespace bigmodel::cpu
