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

using ColumnTable = ColumnKernels[kDTypes];
BIGMODEL_ISA_TABLE(ColumnTable, column_table)

inline const ColumnKernels& column_kernels(DType dtype) { return column_table()[int(dtype)]; }

}  // namespace bigmodel::cpu
