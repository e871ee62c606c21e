// Softmax on the CPU: dtypes, masks, live ranges, threads and the order of every reduction. The arithmetic is in
// softmax.isa.cpp, the formulas in ops/softmax.h.
//
// Bytes per element that must move: forward read scores, write out; backward read y and grad_out, write grad_scores. A
// row is the work of one thread, which finds it in its cache for every pass but the first. Rows longer than
// kSoftmaxPart are cut into parts, counted from the first live key, and shared out by parts; their scores are read
// twice.
#include "../ops/softmax.h"

#include "softmax_backward.h"
#include "softmax_columns.h"
#include "softmax_forward.h"

namespace bigmodel::cpu {

void softmax_forward(const SoftmaxForward& args, Exec exec) {
  if (args.rows.keys > 0) SoftmaxForwardPass(args, exec).run();
}

void softmax_backward(const SoftmaxBackward& args, Exec exec) { SoftmaxBackwardPass(args, exec).run(); }

int64_t softmax_backward_scratch(int64_t, int64_t, bool, bool, Exec) { return 0; }

void softmax_columns_forward(void* out, const void* input, const SoftmaxColumns& columns, DType dtype, Exec exec) {
  for_each_strip(columns, dtype, out, 1, exec, [&](const ColumnStrip& strip, int64_t place) {
    column_kernels(dtype).forward(at(out, dtype, place), at(input, dtype, place), strip);
  });
}

void softmax_columns_backward(void* grad, const void* grad_out, const void* out, const SoftmaxColumns& columns,
                              DType dtype, Exec exec) {
  for_each_strip(columns, dtype, grad, 2, exec, [&](const ColumnStrip& strip, int64_t place) {
    column_kernels(dtype).backward(at(grad, dtype, place), at(grad_out, dtype, place), at(out, dtype, place), strip);
  });
}

}  // namespace bigmodel::cpu
