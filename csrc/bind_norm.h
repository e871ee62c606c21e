// The normalisation row at the Python border.
#pragma once

#include "bind.h"
#include "ops/norm.h"

namespace bigmodel::bind {

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

}  // namespace bigmodel::bind
