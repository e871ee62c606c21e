// What the multi-tensor ops share: a table of tensors, and what every gradient passes through on its way in.
//
// One native call updates all tensors of a parameter group. Python lays their sizes, formats and addresses out in one
// block of 64-bit integers in host memory, column after column; a column has one entry per tensor ("row").
//
//   column 0              elements
//   column 1              formats: 8 bits for each stream, the first in the lowest
//   column 2, 3, ...      addresses of stream 0, 1, ...; 0 where a tensor has no such stream
//
// All streams of a row have the same number of elements in the same dense order, unless an op's header says otherwise.
#pragma once

#include "op.h"

namespace bigmodel {

// How a stream is stored: a code of DType, or 8-bit codes with one float32 scale per kQuantBlock elements (ops/adam.h).
constexpr int kQuantised = 4;
constexpr int64_t kQuantBlock = 256;

BIGMODEL_SHARED constexpr int64_t bytes_of(int format) { return format == kQuantised ? 1 : size_of(DType(format)); }

struct Table {
  const int64_t* values;  // (columns, rows)
  int64_t rows;

  int64_t elements(int64_t row) const { return values[row]; }
  int format(int64_t row, int stream) const { return int(values[rows + row] >> (8 * stream) & 255); }
  void* address(int64_t row, int stream) const { return reinterpret_cast<void*>(values[(2 + stream) * rows + row]); }
};

// gradient = sign * factor / grad_scale * (what is stored), and no write at all where found_inf is not 0. The three
// are scalars on the op's device, read by its kernels, so that nothing waits for them; each may be null.
struct GradControl {
  const double* factor;     // of clipping
  const float* grad_scale;  // of torch.amp.GradScaler
  const float* found_inf;
  bool maximize;  // sign = -1
};

// A learning rate: a number, or a float32 or float64 scalar on the op's device.
struct Rate {
  double value;
  const void* pointer;  // null: value
  DType dtype;
};

}  // namespace bigmodel
