// How an op's row crosses the Python border, for whichever module binds it (_C, or one that tests build).
// Pointers and streams arrive as integers (0 is null), dtypes as codes of op.h; the GIL is released around every call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "op.h"
#include "ops/norm.h"
#include "ops/softmax.h"

namespace bigmodel::bind {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <void (*kernel)(const NormForward&, Exec)>
void norm_forward(Address out, Address summed, Address mean, Address rstd, Address input, Address residual,
                  Address weight, Address bias, int64_t rows, int64_t cols, int64_t input_stride,
                  int64_t residual_stride, int out_dtype, int summed_dtype, int input_dtype, int residual_dtype,
                  int weight_dtype, double eps, double weight_offset, int index, Address stream) {
  pybind11::gil_scoped_release release;
  kernel({pointer(out), pointer(summed), pointer(mean), pointer(rstd), pointer(input), pointer(residual),
          pointer(weight), pointer(bias), rows, cols, input_stride, residual_stride, DType(out_dtype),
          DType(summed_dtype), DType(input_dtype), DType(residual_dtype), DType(weight_dtype), eps, weight_offset},
         {index, pointer(stream)});
}

template <void (*kernel)(const NormBackward&, Exec)>
void norm_backward(Address grad_x, Address grad_cast, Address grad_weight, Address grad_bias, Address partials,
                   Address grad_out, Address grad_summed, Address saved, Address mean, Address rstd, Address weight,
                   Address bias, int64_t rows, int64_t cols, int64_t grad_out_stride, int64_t grad_summed_stride,
                   int64_t saved_stride, int x_dtype, int cast_dtype, int out_dtype, int weight_dtype,
                   double weight_offset, bool from_output, int index, Address stream) {
  pybind11::gil_scoped_release release;
  kernel({pointer(grad_x),
          pointer(grad_cast),
          pointer(grad_weight),
          pointer(grad_bias),
          pointer(partials),
          pointer(grad_out),
          pointer(grad_summed),
          pointer(saved),
          pointer(mean),
          pointer(rstd),
          pointer(weight),
          pointer(bias),
          rows,
          cols,
          grad_out_stride,
          grad_summed_stride,
          saved_stride,
          DType(x_dtype),
          DType(cast_dtype),
          DType(out_dtype),
          DType(weight_dtype),
          weight_offset,
          from_output},
         {index, pointer(stream)});
}

template <int64_t (*blocks)(int64_t, int64_t, Exec)>
int64_t norm_backward_blocks(int64_t rows, int64_t cols, int index) {
  return blocks(rows, cols, {index, nullptr});
}

#define BIGMODEL_BIND_NORM(module, device)                                                                  \
  module.def("layer_norm_forward", &bigmodel::bind::norm_forward<bigmodel::device::layer_norm_forward>);    \
  module.def("rms_norm_forward", &bigmodel::bind::norm_forward<bigmodel::device::rms_norm_forward>);        \
  module.def("layer_norm_backward", &bigmodel::bind::norm_backward<bigmodel::device::layer_norm_backward>); \
  module.def("rms_norm_backward", &bigmodel::bind::norm_backward<bigmodel::device::rms_norm_backward>);     \
  module.def("norm_backward_blocks", &bigmodel::bind::norm_backward_blocks<bigmodel::device::norm_backward_blocks>)

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

#define BIGMODEL_BIND_SOFTMAX(module, device)                                                                      \
  module.def("attention_softmax_forward", &bigmodel::bind::softmax_forward<bigmodel::device::softmax_forward>);    \
  module.def("attention_softmax_backward", &bigmodel::bind::softmax_backward<bigmodel::device::softmax_backward>); \
  module.def("softmax_forward", &bigmodel::bind::plain_softmax_forward<bigmodel::device::softmax_forward>);        \
  module.def("softmax_backward", &bigmodel::bind::plain_softmax_backward<bigmodel::device::softmax_backward>);     \
  module.def("softmax_backward_scratch",                                                                           \
             &bigmodel::bind::softmax_backward_scratch<bigmodel::device::softmax_backward_scratch>)

}  // namespace bigmodel::bind
