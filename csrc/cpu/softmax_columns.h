// Softmax along another dimension than the last on the CPU: strips of columns, each the work of one thread.
//
// Bytes per element that must move: forward read input, write out; backward read y and grad_out, write grad. A strip
// as wide as its scratch allows passes through memory once; columns of more than a block of rows are read twice.
#pragma once

#include <algorithm>

#include "../ops/softmax.h"
#include "parallel.h"
#include "softmax_columns_kernels.h"
#include "softmax_rows.h"

namespace bigmodel::cpu {

// Scratch of a strip in bytes, as large as a second-level cache, since wider strips are worth more than what falls out
// of it (docs/decisions.md); and the columns of a strip at the most.
constexpr int64_t kColumnScratch = int64_t(1) << 20, kColumnWidth = 1024;

// `copies`: matrices of the arithmetic's type in scratch. body(strip, place): the strip's first element.
template <class Body>
void for_each_strip(const SoftmaxColumns& c, DType dtype, const void* written, int copies, Exec exec, Body body) {
  const int64_t step = column_kernels(dtype).step, size = size_of(compute_of(dtype));
  const int64_t elements = kColumnScratch / (size * copies);
  const int threads = useful_threads(exec.index, c.outer * c.n * c.inner);
  int64_t width = std::clamp(elements / std::max<int64_t>(1, c.n) / step * step, step, kColumnWidth);
  const int64_t share = c.outer * c.inner / threads;  // of one thread
  width = std::clamp(share / step * step, step, width);
  const int64_t strips = (c.inner + width - 1) / width, block = std::min(c.n, elements / width);
  const int64_t bytes = c.outer * c.n * c.inner * size_of(dtype);
  const bool streaming = bytes >= kStreamingBytes && c.inner * size_of(dtype) % 64 == 0 &&
                         reinterpret_cast<uintptr_t>(written) % 64 == 0 && resident(written, bytes);
  parallel_for(threads, c.outer * strips, [&](int64_t first, int64_t last) {
    void* scratch = workspace((width + step - 1) / step * step * (copies * (block + 1) * size + 3 * size + 8));
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % strips * width;
      body(ColumnStrip{c.n, c.inner, std::min(width, c.inner - begin), block, scratch, c.log, streaming},
           i / strips * c.n * c.inner + begin);
    }
    if (streaming) store_fence();
  });
}

}  // namespace bigmodel::cpu
