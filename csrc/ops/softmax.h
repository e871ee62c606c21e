// Softmax over the last dimension, with everything that attention does to its scores on the way, and its backward.
//
// Of the score s of query i and key j in one head, with p = i + keys - queries, the key that the query stands at:
//
//   z       = softcap * tanh(scale * s / softcap)           (no softcap: scale * s)
//             + mask                                         (an additive mask)
//             - slope * |p - j|                              (ALiBi)
//   live    = mask is not False, mask is not -inf, p - left <= j <= p + right
//   y       = live ? exp(z - m) / (sum over live j of exp(z - m) + exp(sink - m)) : 0,   m = max over live j, and sink
//   out     = kept ? y / (1 - dropout_p) : 0                 (dropout)
//   out     = z - m - log(sum)                               (log)
//
//   g       = grad_out * (kept ? 1 / (1 - dropout_p) : 0)
//   d       = sum over live j of g * y
//   grad_z  = y * (g - d)
//   grad_scores = grad_z * scale * (1 - tanh(scale * s / softcap)^2)
//   grad_mask   = grad_z summed over the rows that share an element of the mask
//   grad_sinks  = -sum over the rows of a head of d * exp(sink - m) / (the denominator of y)
//   grad_scores = grad_out - exp(out) * sum(grad_out)        (log)
//
// A row with no live score is all zeros with zero gradients, or NaN if `empty_is_nan`. Causal attention is right = 0,
// aligned at the bottom right. What lies outside [p - left, p + right] is written as 0 and never read.
//
// kept: 32-bit word j % 4 of Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011) at counter row * ceil(keys / 4) + j / 4 under the key `seed` is at least dropout_p * 2^32. So the backward
// needs no mask, and a seed gives the same on every device.
//
// Sources: Vaswani et al., "Attention is all you need" (arXiv 1706.03762); ALiBi: Press, Smith, Lewis (arXiv
// 2108.12409); soft-capping: Gemma 2 (arXiv 2408.00118); sinks: Agarwal et al., gpt-oss model card (arXiv 2508.10925).
// Arithmetic is float32, or float64 for float64 scores. Keys are contiguous in every matrix but the mask.
#pragma once

#include "../op.h"

namespace bigmodel {

constexpr int64_t kUnlimited = INT64_MAX;  // for left and right
constexpr int kBool = -1;                  // for mask_dtype

// (outer, more outer, heads, queries): the rows of a matrix are its elements in this order.
struct RowDims { int64_t d[4]; };

struct SoftmaxRows {
  RowDims dims;
  int64_t keys;
  int64_t left, right;
  const void* seed;                  // one int64 in the device's memory; unread without dropout
  double scale, softcap, dropout_p;  // softcap and dropout_p are 0 when not wanted
  bool log;
};

struct SoftmaxForward {
  SoftmaxRows rows;
  void* out;           // (rows, keys) out_dtype
  void* probs;         // (rows, keys) out_dtype: y before dropout; null without dropout
  void* sink_probs;    // (rows) float32 or float64: the sink's share of the denominator; null when not wanted
  const void* scores;  // (rows, keys) scores_dtype; may be `out`
  const void* mask;    // broadcast over (rows, keys); bytes for kBool, else of dtype mask_dtype; or null
  const void* slopes;  // (heads) float32 or float64, or null
  const void* sinks;   // (heads) float32 or float64, or null
  RowDims out_strides, scores_strides, mask_strides;  // in elements; 0 where the mask is broadcast
  int64_t mask_key_stride;
  DType out_dtype, scores_dtype;
  int mask_dtype;
  bool empty_is_nan;
};

struct SoftmaxBackward {
  SoftmaxRows rows;
  void* grad_scores;                         // (rows, keys) scores_dtype
  void* grad_mask;                           // (mask_dims, keys or 1) float32 or float64; null when not wanted
  void* grad_sinks;                          // (heads) float32 or float64; null when not wanted
  void* scratch;                             // softmax_backward_scratch elements of float32 or float64
  const void* grad_out;                      // (rows, keys) out_dtype
  const void* saved;                         // (rows, keys) out_dtype: y, or with log `out`
  const void* scores;                        // (rows, keys) scores_dtype; null without softcap
  const void* sink_probs;                    // (rows) float32 or float64, or null
  RowDims grad_out_strides, scores_strides;  // grad_scores and saved lie row by row
  RowDims mask_dims;                         // 1 where the mask is broadcast, else the rows' own; of grad_mask only
  int64_t mask_keys;                         // 1 or keys
  DType out_dtype, scores_dtype;
};

// softmax or log_softmax down n elements that lie `inner` apart, of contiguous (outer, n, inner): y and grad_scores as
// above, of z = scores. One dtype; a column of -inf alone gives NaN.
struct SoftmaxColumns {
  int64_t outer, n, inner;
  bool log;
};

namespace cpu {
void softmax_columns_forward(void* out, const void* input, const SoftmaxColumns& columns, DType dtype, Exec exec);
void softmax_columns_backward(void* grad, const void* grad_out, const void* out, const SoftmaxColumns& columns,
                              DType dtype, Exec exec);
void softmax_forward(const SoftmaxForward& args, Exec exec);
void softmax_backward(const SoftmaxBackward& args, Exec exec);
// 0: the CPU keeps its partial sums itself.
int64_t softmax_backward_scratch(int64_t rows, int64_t keys, bool wants_mask, bool wants_sinks, Exec exec);
}  // namespace cpu

namespace cuda {
void softmax_forward(const SoftmaxForward& args, Exec exec);
void softmax_backward(const SoftmaxBackward& args, Exec exec);
// Elements of SoftmaxBackward::scratch.
int64_t softmax_backward_scratch(int64_t rows, int64_t keys, bool wants_mask, bool wants_sinks, Exec exec);
}  // namespace cuda

}  // namespace bigmodel
