// What csrc/cpu/softmax.cpp asks of csrc/cpu/softmax.isa.cpp: kernels over a part of one row. T is the arithmetic's
// type, float or double; S, a storage type of that arithmetic, indexes the tables.
#pragma once

#include "../op.h"
#include "isa.h"

namespace bigmodel::cpu {

// z = scale * s, changed as the fields say.
struct SoftmaxScores {
  const void* scores;  // (n) S
  const void* added;   // (n) T, or null; where it is -inf z is -inf, whatever the score
  int64_t n;
  double scale, softcap, slope;  // softcap and slope are 0 when not wanted
  int64_t distance;              // from the first key to the query
};

// Memory that is wanted soon: `bytes` for each step of the loop that asks for it.
struct Ahead {
  const void* base;
  int64_t bytes;
};

constexpr int64_t kSlack = 64;

struct SoftmaxKernels {
  int64_t step;                                                 // elements in one step of a loop
  double (*peak)(const void* scores, int64_t n, double scale);  // the largest scale * s, not NaN
  double (*prepare)(void* z, const SoftmaxScores& scores);      // stores z in T, and the largest
  // e = exp(scale * s - peak) in T, and its sum.
  double (*exp_sum)(void* e, const void* scores, int64_t n, double scale, double peak, Ahead ahead);
  // out = e * factor * factors[i], rounded once; factors in T, or null.
  void (*finish)(void* out, const void* e, const void* factors, int64_t n, double factor);
  // out = e * factor, past the caches; n in whole steps.
  void (*finish_streaming)(void* out, const void* e, int64_t n, double factor);
  void (*finish_log)(void* out, const void* scores, int64_t n, double scale, double peak, double log_sum);

  double (*grad_dot)(const void* grad_out, const void* y, int64_t n);  // the sum of their products
  void (*grad_apply)(void* grad, const void* grad_out, const void* y, int64_t n, double dot, double scale, Ahead ahead,
                     Ahead also);  // y * (grad_out - dot) * scale
  // The same past the caches, and zeros from n on; `keys` in whole steps.
  void (*grad_apply_streaming)(void* grad, const void* grad_out, const void* y, int64_t n, int64_t keys, double dot,
                               double scale, Ahead ahead, Ahead also);
  double (*sum)(const void* values, int64_t n);
  void (*grad_log)(void* grad, const void* grad_out, const void* out, int64_t n, double sum);
  // grad *= scale * (1 - tanh(s * scale / softcap)^2), s and grad of one type S; and scale alone with softcap 0.
  void (*grad_scores)(void* grad, const void* scores, int64_t n, double scale, double softcap);
  void (*multiply)(void* values, const void* by, int64_t n);
  // factors[i] = `kept` where word i of Philox from a counter on is at least `threshold`, else 0. Writes whole steps:
  // up to kSlack elements beyond n.
  void (*dropout)(void* factors, int64_t n, uint64_t seed, uint64_t counter, uint32_t threshold, double kept);
  void (*spread)(void* added, const void* live, int64_t n);  // 0 where a byte is not 0, else -inf
};

using SoftmaxTable = SoftmaxKernels[kDTypes];
BIGMODEL_ISA_TABLE(SoftmaxTable, softmax_table)

inline const SoftmaxKernels& softmax_kernels(DType dtype) { return softmax_table()[int(dtype)]; }

}  // namespace bigmodel::cpu
