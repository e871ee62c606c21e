// Fills _C.cpu and, when CUDA is built, _C.cuda with the same names; with bind*.h, all that knows Python.
#include <pybind11/stl.h>

#include "bind_norm.h"
#include "bind_softmax.h"
#include "bind_tensors.h"
#include "bind_updates.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#if BIGMODEL_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace bigmodel;

PYBIND11_MODULE(_C, m) {
  py::module_ cpu = m.def_submodule("cpu");
  BIGMODEL_BIND_NORM(cpu, cpu);
  BIGMODEL_BIND_UPDATES(cpu, cpu);
  cpu.def("adam_touch", [](bind::Address values, int64_t rows, int threads) {
    py::gil_scoped_release release;
    cpu::adam_touch(bind::table(values, rows), {threads, nullptr});
  });
  BIGMODEL_BIND_SOFTMAX(cpu, cpu);
  cpu.def("softmax_columns_forward", &bind::softmax_columns_forward);
  cpu.def("softmax_columns_backward", &bind::softmax_columns_backward);
  cpu.def("advise_huge_pages",
          [](bind::Address address, int64_t bytes) { cpu::advise_huge_pages(bind::pointer(address), bytes); });
  cpu.def("isas_built", &cpu::isas_built);
  cpu.def("isas_usable", &cpu::isas_usable);
  cpu.def("isa_chosen", &cpu::isa_chosen);
  cpu.def("choose_isa", &cpu::choose_isa, py::arg("name"));

  m.def("describe_tensors", &bind::describe_tensors);
  m.def("read_addresses", &bind::read_addresses);
  m.def("flatten", &bind::flatten);
  m.def("all_plain", &bind::all_plain);
  m.def("same_items", &bind::same_items);
  m.def("gradients_and_states", &bind::gradients_and_states);
  m.attr("cuda_architectures") = BIGMODEL_CUDA_ARCHITECTURES;
  m.attr("cuda_status") = BIGMODEL_CUDA_STATUS;
  m.attr("compiler") = BIGMODEL_COMPILER;
#if BIGMODEL_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda");
  BIGMODEL_BIND_NORM(cuda, cuda);
  BIGMODEL_BIND_UPDATES(cuda, cuda);
  BIGMODEL_BIND_SOFTMAX(cuda, cuda);
  cuda.def("runtime_version", &cuda::runtime_version);
  cuda.def("driver_version", &cuda::driver_version);
  cuda.def("device_count", &cuda::device_count);
#endif
}
