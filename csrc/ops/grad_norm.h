// The norm of many gradients as of one vector, the factor that clips it, and the clipping alone.
//
//   total   = sum of |g| ^ power        (power 1 or 2),  or  max |g|  (power 0, the infinity norm)
//   norm    = total ^ (1 / power) / grad_scale
//   factor  = min(1, max_norm / (norm + 1e-6))                                   as in torch.nn.utils.clip_grad_norm_
//   skip    = found_inf != 0, or skip_nonfinite and norm is infinite or NaN
//   skipped = skipped + skip
//
// Between the two a caller may add `total` up over shards. Chunks of a fixed size are summed in float32 (float64 for
// float64), never more than 64 terms to a number, and joined in float64 in a fixed order: the bits depend neither on
// threads nor on how blocks are scheduled. NaN and infinities propagate, also into the infinity norm.
//
//   grad_scale: g = factor * g
#pragma once

#include "../table.h"

namespace bigmodel {

enum GradStream { kGradValue, kGradStreams };

struct GradTotal {
  double* total;     // one element
  double* partials;  // scratch: grad_total_partials(table) elements; null on the CPU
  Table table;
  int power;
};

struct GradClip {
  void* norm;               // one element, float32 or float64
  double* factor;           // one element
  float* skip;              // one element, 0 or 1
  float* skipped;           // one element, added to; or null
  const double* total;      // one element
  const float* grad_scale;  // or null
  const float* found_inf;   // or null
  DType norm_dtype;
  int power;
  double max_norm;
  bool skip_nonfinite;
};

struct GradScale {
  Table table;
  const double* factor;  // one element
};

namespace cpu {
void grad_total(const GradTotal& args, Exec exec);
void grad_clip(const GradClip& args, Exec exec);
void grad_scale(const GradScale& args, Exec exec);
// 0: the CPU keeps its partial sums itself.
int64_t grad_total_partials(const Table& table);
}  // namespace cpu

namespace cuda {
void grad_total(const GradTotal& args, Exec exec);
void grad_clip(const GradClip& args, Exec exec);
void grad_scale(const GradScale& args, Exec exec);
int64_t grad_total_partials(const Table& table);
}  // namespace cuda

}  // namespace bigmodel
