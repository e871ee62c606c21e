// The functions of _C.cuda, from kernels that run on the executor.
#include "bind_norm.h"
#include "bind_softmax.h"
#include "bind_updates.h"
#include "cuda/device.h"

PYBIND11_MODULE(_cuda_host, m) {
  BIGMODEL_BIND_NORM(m, cuda);
  BIGMODEL_BIND_UPDATES(m, cuda);
  BIGMODEL_BIND_SOFTMAX(m, cuda);
  m.def("runtime_version", &bigmodel::cuda::runtime_version);
  m.def("driver_version", &bigmodel::cuda::driver_version);
  m.def("device_count", &bigmodel::cuda::device_count);
}
