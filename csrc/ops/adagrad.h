// Adagrad over all tensors of a parameter group.
//
//   step  += 1
//   g      = sign * factor / grad_scale * grad + weight_decay * param            (GradControl in table.h)
//   sum    = sum + g^2
//   param  = param - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(sum) + eps)
//
// Arithmetic is in float32, in float64 for a float64 parameter. Where found_inf is not 0 nothing is written.
// Source: Duchi, Hazan, Singer, "Adaptive subgradient methods for online learning and stochastic optimization" (2011).
#pragma once

#include "../table.h"

namespace bigmodel {

enum AdagradStream {
  kAdagradParam,
  kAdagradGrad,
  kAdagradSum,
  kAdagradStep,  // one element, float32 or float64
  kAdagradStreams
};

struct Adagrad {
  Table table;
  GradControl control;
  Rate lr;
  double lr_decay, weight_decay, eps;
  void* scratch;  // (rows, 4) float64 on the device; null on the CPU
};

namespace cpu {
void adagrad(const Adagrad& args, Exec exec);
}  // namespace cpu

namespace cuda {
void adagrad(const Adagrad& args, Exec exec);
}  // namespace cuda

}  // namespace bigmodel
