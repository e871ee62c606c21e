// Stochastic gradient descent with momentum over all tensors of a parameter group.
//
//   g        = sign * factor / grad_scale * grad + weight_decay * param          (GradControl in table.h)
//   momentum_buffer = first ? g : momentum * momentum_buffer + (1 - dampening) * g
//   g        = nesterov ? g + momentum * momentum_buffer : momentum_buffer       (without momentum: g)
//   param    = param - lr * g
//
// `first` is a property of each row, since a parameter may get its first gradient later than others. It only matters
// with dampening; a buffer that begins as zeros gives the same without.
// Arithmetic is in float32, in float64 for a float64 parameter. Where found_inf is not 0 nothing is written.
// Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning" (2013),
// in the form that torch.optim.SGD has.
#pragma once

#include "../table.h"

namespace bigmodel {

enum SgdStream {
  kSgdParam,
  kSgdGrad,
  kSgdMomentum,  // absent without momentum
  kSgdStarted,   // one float32 element, 0 before the first step and 1 after it; absent: as if 1
  kSgdStreams
};

struct Sgd {
  Table table;
  GradControl control;
  Rate lr;
  double momentum, dampening, weight_decay;
  bool nesterov;
  void* scratch;  // (rows, 4) float64 on the device; null on the CPU
};

namespace cpu {
void sgd(const Sgd& args, Exec exec);
}  // namespace cpu

namespace cuda {
void sgd(const Sgd& args, Exec exec);
}  // namespace cuda

}  // namespace bigmodel
