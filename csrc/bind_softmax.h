// The softmax row at the Python border.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bind.h"
#include "ops/softmax.h"

namespace bigmodel::bind {

// (dims, keys, left, right, seed, scale, softcap, dropout_p, log) of every softmax call.
using Dims = std::array<int64_t, 4>;
inline RowDims row_dims(const Dims& dims) { return {{dims[0], dims[1], dims[2], dims[3]}}; }
using SoftmaxRowsTuple = std::tuple<Dims, int64_t, int64_t, int64_t, Address, double, double, double, bool>;
inline SoftmaxRows softmax_rows(const SoftmaxRowsTuple& rows) {
  return std::apply(
      [](const Dims& dims, int64_t keys, int64_t left, int64_t right, Address seed, auto... scalars) {
        return SoftmaxRows{row_dims(dims), keys, left, right, pointer(seed), scalars...};
      },
      rows);
}

template <void (*kernel)(const SoftmaxForward&, Exec)>
void softmax_forward(Address out, Address probs, Address sink_probs, Address scores, Address mask, Address slopes,
                     Address sinks, const SoftmaxRowsTuple& rows, Dims out_strides, Dims scores_strides,
                     Dims mask_strides, int64_t mask_key_stride, int out_dtype, int scores_dtype, int mask_dtype,
                     bool empty_is_nan, int index, Address stream) {
  pybind11::gil_scoped_release release;
  kernel({softmax_rows(rows), pointer(out), pointer(probs), pointer(sink_probs), pointer(scores), pointer(mask),
          pointer(slopes), pointer(sinks), row_dims(out_strides), row_dims(scores_strides), row_dims(mask_strides),
          mask_key_stride, DType(out_dtype), DType(scores_dtype), mask_dtype, empty_is_nan},
         {index, pointer(stream)});
}

template <void (*kernel)(const SoftmaxBackward&, Exec)>
void softmax_backward(Address grad_scores, Address grad_mask, Address grad_sinks, Address scratch, Address grad_out,
                      Address saved, Address scores, Address sink_probs, const SoftmaxRowsTuple& rows,
                      Dims grad_out_strides, Dims scores_strides, Dims mask_dims, int64_t mask_keys, int out_dtype,
                      int scores_dtype, int index, Address stream) {
  pybind11::gil_scoped_release release;
  kernel({softmax_rows(rows), pointer(grad_scores), pointer(grad_mask), pointer(grad_sinks), pointer(scratch),
          pointer(grad_out), pointer(saved), pointer(scores), pointer(sink_probs), row_dims(grad_out_strides),
          row_dims(scores_strides), row_dims(mask_dims), mask_keys, DType(out_dtype), DType(scores_dtype)},
         {index, pointer(stream)});
}

// Elements of scratch for a backward over `rows` rows, of which the mask's gradient is `wanted`.
template <int64_t (*scratch)(int64_t, int64_t, bool, bool, Exec)>
int64_t softmax_backward_scratch(int64_t rows, int64_t keys, bool wants_mask, bool wants_sinks, int index) {
  return scratch(rows, keys, wants_mask, wants_sinks, {index, nullptr});
}

// Contiguous rows without any option, for which the conversions above would take longer than a small call's arithmetic.
inline SoftmaxRows plain_rows(int64_t rows, int64_t cols, bool log) {
  return {{{1, 1, 1, rows}}, cols, kUnlimited, kUnlimited, nullptr, 1, 0, 0, log};
}

template <void (*kernel)(const SoftmaxForward&, Exec)>
void plain_softmax_forward(Address out, Address input, int64_t rows, int64_t cols, bool log, int out_dtype,
                           int input_dtype, int index, Address stream) {
  pybind11::gil_scoped_release release;
  SoftmaxForward args{};
  args.rows = plain_rows(rows, cols, log);
  args.out = pointer(out);
  args.scores = pointer(input);
  args.out_strides = args.scores_strides = {{0, 0, 0, cols}};
  args.out_dtype = DType(out_dtype);
  args.scores_dtype = DType(input_dtype);
  args.empty_is_nan = true;
  kernel(args, {index, pointer(stream)});
}

template <void (*kernel)(const SoftmaxBackward&, Exec)>
void plain_softmax_backward(Address grad, Address grad_out, Address out, int64_t rows, int64_t cols, bool log,
                            int out_dtype, int input_dtype, int index, Address stream) {
  pybind11::gil_scoped_release release;
  SoftmaxBackward args{};
  args.rows = plain_rows(rows, cols, log);
  args.grad_scores = pointer(grad);
  args.grad_out = pointer(grad_out);
  args.saved = pointer(out);
  args.grad_out_strides = {{0, 0, 0, cols}};
  args.out_dtype = DType(out_dtype);
  args.scores_dtype = DType(input_dtype);
  kernel(args, {index, pointer(stream)});
}

inline void softmax_columns_forward(Address out, Address input, int64_t outer, int64_t n, int64_t inner, bool log,
                                    int dtype, int threads, Address) {
  pybind11::gil_scoped_release release;
  cpu::softmax_columns_forward(pointer(out), pointer(input), {outer, n, inner, log}, DType(dtype), {threads, nullptr});
}

inline void softmax_columns_backward(Address grad, Address grad_out, Address out, int64_t outer, int64_t n,
                                     int64_t inner, bool log, int dtype, int threads, Address) {
  pybind11::gil_scoped_release release;
  cpu::softmax_columns_backward(pointer(grad), pointer(grad_out), pointer(out), {outer, n, inner, log}, DType(dtype),
                                {threads, nullptr});
}

#define BIGMODEL_BIND_SOFTMAX(module, device)                                                                      \
  module.def("attention_softmax_forward", &bigmodel::bind::softmax_forward<bigmodel::device::softmax_forward>);    \
  module.def("attention_softmax_backward", &bigmodel::bind::softmax_backward<bigmodel::device::softmax_backward>); \
  module.def("softmax_forward", &bigmodel::bind::plain_softmax_forward<bigmodel::device::softmax_forward>);        \
  module.def("softmax_backward", &bigmodel::bind::plain_softmax_backward<bigmodel::device::softmax_backward>);     \
  module.def("softmax_backward_scratch",                                                                           \
             &bigmodel::bind::softmax_backward_scratch<bigmodel::device::softmax_backward_scratch>)

}  // namespace bigmodel::bind
