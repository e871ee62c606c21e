// The only file that knows Python: it fills _C.cpu and, when CUDA is built, _C.cuda with the same names.
// Pointers and streams arrive as integers (0 is null), dtypes as codes of op.h; the GIL is released around every call.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "op.h"
#include "ops/norm.h"
#if BIGMODEL_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace bigmodel;

namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }

template <void (*kernel)(const NormForward&, Exec)>
void norm_forward(Address out, Address summed, Address mean, Address rstd,
                  Address input, Address residual, Address weight, Address bias,
                  int64_t rows, int64_t cols, int64_t input_stride, int64_t residual_stride,
                  int out_dtype, int summed_dtype, int input_dtype, int residual_dtype, int weight_dtype,
                  double eps, double weight_offset, int index, Address stream) {
  py::gil_scoped_release release;
  kernel({pointer(out), pointer(summed), pointer(mean), pointer(rstd),
          pointer(input), pointer(residual), pointer(weight), pointer(bias),
          rows, cols, input_stride, residual_stride,
          DType(out_dtype), DType(summed_dtype), DType(input_dtype), DType(residual_dtype), DType(weight_dtype),
          eps, weight_offset},
         {index, pointer(stream)});
}

template <void (*kernel)(const NormBackward&, Exec)>
void norm_backward(Address grad_x, Address grad_cast, Address grad_weight, Address grad_bias, Address partials,
                   Address grad_out, Address grad_summed, Address saved, Address mean, Address rstd,
                   Address weight, Address bias,
                   int64_t rows, int64_t cols, int64_t grad_out_stride, int64_t grad_summed_stride, int64_t saved_stride,
                   int x_dtype, int cast_dtype, int out_dtype, int weight_dtype,
                   double weight_offset, bool from_output, int index, Address stream) {
  py::gil_scoped_release release;
  kernel({pointer(grad_x), pointer(grad_cast), pointer(grad_weight), pointer(grad_bias), pointer(partials),
          pointer(grad_out), pointer(grad_summed), pointer(saved), pointer(mean), pointer(rstd),
          pointer(weight), pointer(bias),
          rows, cols, grad_out_stride, grad_summed_stride, saved_stride,
          DType(x_dtype), DType(cast_dtype), DType(out_dtype), DType(weight_dtype),
          weight_offset, from_output},
         {index, pointer(stream)});
}

template <int64_t (*blocks)(int64_t, int64_t, Exec)>
int64_t norm_backward_blocks(int64_t rows, int64_t cols, int index) { return blocks(rows, cols, {index, nullptr}); }

#define BIGMODEL_BIND_NORM(module, device)                                               \
  module.def("layer_norm_forward", &norm_forward<device::layer_norm_forward>);           \
  module.def("rms_norm_forward", &norm_forward<device::rms_norm_forward>);               \
  module.def("layer_norm_backward", &norm_backward<device::layer_norm_backward>);        \
  module.def("rms_norm_backward", &norm_backward<device::rms_norm_backward>);            \
  module.def("norm_backward_blocks", &norm_backward_blocks<device::norm_backward_blocks>)

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::module_ cpu = m.def_submodule("cpu");
  BIGMODEL_BIND_NORM(cpu, cpu);
  cpu.def("isas_built", &cpu::isas_built);
  cpu.def("isas_usable", &cpu::isas_usable);
  cpu.def("isa_chosen", &cpu::isa_chosen);
  cpu.def("choose_isa", &cpu::choose_isa, py::arg("name"));
  cpu.def("advise_huge_pages", [](Address address, int64_t bytes) { cpu::advise_huge_pages(pointer(address), bytes); });

  m.attr("cuda_architectures") = BIGMODEL_CUDA_ARCHITECTURES;
  m.attr("cuda_status") = BIGMODEL_CUDA_STATUS;
  m.attr("compiler") = BIGMODEL_COMPILER;
#if BIGMODEL_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda");
  BIGMODEL_BIND_NORM(cuda, cuda);
  cuda.def("runtime_version", &cuda::runtime_version);
  cuda.def("driver_version", &cuda::driver_version);
  cuda.def("device_count", &cuda::device_count);
#endif
}
