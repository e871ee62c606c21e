// What csrc/cpu/softmax_columns.h asks of csrc/cpu/softmax.isa.cpp: softmax down a strip of columns.
#pragma once

#include "../op.h"
#include "isa.h"

namespace bigmodel::cpu {

// `width` columns side by side of n elements each, which lie `stride` apart. Blocks of `block` rows pass through
// `scratch`, columns_scratch bytes aligned to a cache line; with one block, memory is read once.
struct ColumnStrip {
  int64_t n, stride, width, block;
  void* scratch;
  bool log, streaming;  // streaming: store past the caches, every row of the strip is whole cache lines
};

struct ColumnKernels {
  int64_t step;  // columns that are computed side by side
  // out = softmax or log_softmax of input, both in the storage type that indexes the tables.
  void (*forward)(void* out, const void* input, const ColumnStrip& strip);
  void (*backward)(void* grad, const void* grad_out, const void* out, const ColumnStrip& strip);
};

#define BIGMODEL_DECLARE(isa)                  \
  namespace isa {                              \
  extern const ColumnKernels column_kernels[]; \
  }
BIGMODEL_FOR_EACH_ISA(BIGMODEL_DECLARE)
#undef BIGMODEL_DECLARE

inline const ColumnKernels& column_kernels(DType dtype) {
#define BIGMODEL_ENTRY(isa) isa::column_kernels,
  static const ColumnKernels* const tables[] = {BIGMODEL_FOR_EACH_ISA(BIGMODEL_ENTRY)};
#undef BIGMODEL_ENTRY
  return tables[isa_index()][int(dtype)];
}

}  // namespace bigmodel::cpu
