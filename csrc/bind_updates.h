// The optimizer rows at the Python border.
#pragma once

#include "bind.h"
#include "ops/adagrad.h"
#include "ops/adam.h"
#include "ops/ema.h"
#include "ops/grad_norm.h"
#include "ops/sgd.h"

namespace bigmodel::bind {

inline Table table(Address values, int64_t rows) { return {pointer<const int64_t>(values), rows}; }

inline GradControl control(Address factor, Address grad_scale, Address found_inf, bool maximize) {
  return {pointer<const double>(factor), pointer<const float>(grad_scale), pointer<const float>(found_inf), maximize};
}

inline Rate rate(double value, Address address, int dtype) { return {value, pointer(address), DType(dtype)}; }

template <void (*kernel)(const Adam&, Exec)>
void adam(Address values, int64_t rows, Address factor, Address grad_scale, Address found_inf, bool maximize, double lr,
          Address lr_address, int lr_dtype, double beta1, double beta2, double eps, double weight_decay,
          double ema_decay, bool decoupled, bool stochastic, uint64_t seed, Address scratch, int index,
          Address stream) {
  pybind11::gil_scoped_release release;
  kernel({table(values, rows), control(factor, grad_scale, found_inf, maximize), rate(lr, lr_address, lr_dtype), beta1,
          beta2, eps, weight_decay, ema_decay, decoupled, stochastic, seed, pointer(scratch)},
         {index, pointer(stream)});
}

template <void (*kernel)(const Sgd&, Exec)>
void sgd(Address values, int64_t rows, Address factor, Address grad_scale, Address found_inf, bool maximize, double lr,
         Address lr_address, int lr_dtype, double momentum, double dampening, double weight_decay, bool nesterov,
         Address scratch, int index, Address stream) {
  pybind11::gil_scoped_release release;
  kernel({table(values, rows), control(factor, grad_scale, found_inf, maximize), rate(lr, lr_address, lr_dtype),
          momentum, dampening, weight_decay, nesterov, pointer(scratch)},
         {index, pointer(stream)});
}

template <void (*kernel)(const Adagrad&, Exec)>
void adagrad(Address values, int64_t rows, Address factor, Address grad_scale, Address found_inf, bool maximize,
             double lr, Address lr_address, int lr_dtype, double lr_decay, double weight_decay, double eps,
             Address scratch, int index, Address stream) {
  pybind11::gil_scoped_release release;
  kernel({table(values, rows), control(factor, grad_scale, found_inf, maximize), rate(lr, lr_address, lr_dtype),
          lr_decay, weight_decay, eps, pointer(scratch)},
         {index, pointer(stream)});
}

template <void (*kernel)(const Ema&, Exec)>
void ema(Address values, int64_t rows, double decay, int index, Address stream) {
  pybind11::gil_scoped_release release;
  kernel({table(values, rows), decay}, {index, pointer(stream)});
}

template <void (*kernel)(const GradTotal&, Exec)>
void grad_total(Address total, Address partials, Address values, int64_t rows, int power, int index, Address stream) {
  pybind11::gil_scoped_release release;
  kernel({pointer<double>(total), pointer<double>(partials), table(values, rows), power}, {index, pointer(stream)});
}

template <void (*kernel)(const GradClip&, Exec)>
void grad_clip(Address norm, Address factor, Address skip, Address skipped, Address total, Address grad_scale,
               Address found_inf, int norm_dtype, int power, double max_norm, bool skip_nonfinite, int index,
               Address stream) {
  pybind11::gil_scoped_release release;
  kernel({pointer(norm), pointer<double>(factor), pointer<float>(skip), pointer<float>(skipped),
          pointer<const double>(total), pointer<const float>(grad_scale), pointer<const float>(found_inf),
          DType(norm_dtype), power, max_norm, skip_nonfinite},
         {index, pointer(stream)});
}

template <void (*kernel)(const GradScale&, Exec)>
void grad_scale(Address values, int64_t rows, Address factor, int index, Address stream) {
  pybind11::gil_scoped_release release;
  kernel({table(values, rows), pointer<const double>(factor)}, {index, pointer(stream)});
}

template <int64_t (*partials)(const Table&)>
int64_t grad_total_partials(Address values, int64_t rows) {
  return partials(table(values, rows));
}

#define BIGMODEL_BIND_UPDATES(module, device)                                          \
  module.def("adam", &bigmodel::bind::adam<bigmodel::device::adam>);                   \
  module.def("sgd", &bigmodel::bind::sgd<bigmodel::device::sgd>);                      \
  module.def("adagrad", &bigmodel::bind::adagrad<bigmodel::device::adagrad>);          \
  module.def("ema", &bigmodel::bind::ema<bigmodel::device::ema>);                      \
  module.def("grad_total", &bigmodel::bind::grad_total<bigmodel::device::grad_total>); \
  module.def("grad_clip", &bigmodel::bind::grad_clip<bigmodel::device::grad_clip>);    \
  module.def("grad_scale", &bigmodel::bind::grad_scale<bigmodel::device::grad_scale>); \
  module.def("grad_total_partials", &bigmodel::bind::grad_total_partials<bigmodel::device::grad_total_partials>)

}  // namespace bigmodel::bind
