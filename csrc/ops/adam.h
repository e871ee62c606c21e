// Adam and AdamW over all tensors of a parameter group, with everything a training step does around them in the same
// pass: unscaling and clipping of the gradient, amsgrad, a float32 master copy, an exponential moving average of the
// weights, states in fewer bits.
//
//   step       += 1
//   g           = sign * factor / grad_scale * grad                  (GradControl in table.h)
//   decoupled:  w = w * (1 - lr * weight_decay);        else:        g = g + weight_decay * w
//   exp_avg     = exp_avg + (1 - beta1) * (g - exp_avg)
//   exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * g^2
//   s           = exp_avg_sq;      with max_exp_avg_sq:  s = max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)
//   w           = w - lr / (1 - beta1^step) * exp_avg / (sqrt(s) / sqrt(1 - beta2^step) + eps)
//   ema         = ema + (1 - ema_decay) * (w - ema)
//   param       = round(w)
//
// w is the master where there is one, else the parameter. It is rounded to the parameter's dtype only when it is
// stored: to nearest even, or stochastically. Arithmetic is in float32, in float64 for a float64 parameter; the bias
// corrections are computed once per tensor in float64. Where found_inf is not 0 nothing is written, `step` included.
//
// Sources: Kingma, Ba, "Adam" (arXiv 1412.6980); Loshchilov, Hutter, "Decoupled weight decay regularization"
// (arXiv 1711.05101); Reddi, Kale, Kumar, "On the convergence of Adam and beyond" (arXiv 1904.09237).
//
// 8-bit states: the dynamic code of Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv 2110.02861).
// A block of kQuantBlock elements is divided by its largest magnitude, which is its scale, and each quotient takes the
// nearest of 256 values: 0, 1, and in each of seven decades 2^d equal steps of (0.1, 1] * 10^-k by their midpoints.
// Signed, for exp_avg: d = 6 - k, and all but 0 and 1 with both signs; unsigned, for exp_avg_sq: d = 7 - k, and what
// is positive never takes 0, since exp_avg / (sqrt(0) + eps) would be a step of any size.
//
// Stochastic rounding goes up with the probability of the part that is cut off. Its random bits are a hash of (seed,
// row, step, element): they depend neither on threads nor on the device.
#pragma once

#include "../table.h"

namespace bigmodel {

// The streams of the table, with their formats; all but param, grad, exp_avg, exp_avg_sq and step may be absent.
enum AdamStream {
  kAdamParam,
  kAdamGrad,
  kAdamExpAvg,         // a dtype, or quantised
  kAdamExpAvgSq,       // a dtype, or quantised
  kAdamMaxExpAvgSq,    // a dtype
  kAdamMaster,         // float32
  kAdamEma,            // a dtype
  kAdamStep,           // one element, float32 or float64
  kAdamExpAvgScale,    // one float32 per kQuantBlock elements; no format
  kAdamExpAvgSqScale,  // the same
  kAdamStreams
};

struct Adam {
  Table table;
  GradControl control;
  Rate lr;
  double beta1, beta2, eps, weight_decay, ema_decay;
  bool decoupled;
  bool stochastic;  // round to bfloat16 and float16 parameters stochastically
  uint64_t seed;
  void* scratch;  // (rows, 4) float64 on the device; null on the CPU
};

namespace cpu {
void adam(const Adam& args, Exec exec);
// Reads and writes the streams of an Adam call and leaves every value as it was: the roof that the benchmark measures.
void adam_touch(const Table& table, Exec exec);
}  // namespace cpu

namespace cuda {
void adam(const Adam& args, Exec exec);
}  // namespace cuda

}  // namespace bigmodel
