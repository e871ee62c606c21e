// What csrc/cpu/ema.cpp asks of csrc/cpu/ema.isa.cpp: the average of one chunk, both streams in the compute type.
#pragma once

#include "../ops/ema.h"
#include "isa.h"

namespace bigmodel::cpu {

struct EmaTable {
  void (*update[2])(void* const* stream, int64_t n, double one_less_decay);  // by compute type: float, double
};

#define BIGMODEL_DECLARE(isa)      \
  namespace isa {                  \
  extern const EmaTable ema_table; \
  }
BIGMODEL_FOR_EACH_ISA(BIGMODEL_DECLARE)
#undef BIGMODEL_DECLARE

inline const EmaTable& ema_table() {
#define BIGMODEL_ENTRY(isa) &isa::ema_table,
  static const EmaTable* const tables[] = {BIGMODEL_FOR_EACH_ISA(BIGMODEL_ENTRY)};
#undef BIGMODEL_ENTRY
  return *tables[isa_index()];
}

}  // namespace bigmodel::cpu
