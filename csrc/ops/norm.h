// Layer normalisation and root-mean-square normalisation over the last dimension of a matrix of rows, with the
// residual addition before it and both backward passes.
//
//   x       = input                     or, with a residual, round(input + residual), stored in `summed`
//   mean    = sum(x) / cols             (layer_norm; 0 for rms_norm)
//   rstd    = 1 / sqrt(sum((x - mean)^2) / cols + eps)
//   xhat    = (x - mean) * rstd
//   out     = xhat * (weight + weight_offset) + bias
//
//   g       = grad_out * (weight + weight_offset)
//   grad_x  = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_summed        (rms_norm: no mean(g))
//   grad_weight = sum over rows of grad_out * xhat,   grad_bias = sum over rows of grad_out
//
// Sources: Ba, Kiros, Hinton, "Layer Normalization" (arXiv 1607.06450); Zhang, Sennrich, "Root Mean Square Layer
// Normalization" (arXiv 1910.07467). A null weight is ones (then weight_offset must be 0), a null bias zeros.
// Arithmetic and statistics are float32, or float64 when the normalised x is float64.
// Rows are contiguous; a stride is the distance between two rows in elements. Outputs have stride cols.
#pragma once

#include "../op.h"

namespace bigmodel {

struct NormForward {
  void* out;             // (rows, cols) out_dtype
  void* summed;          // (rows, cols) summed_dtype; null without a residual
  void* mean;            // (rows) float32 or float64; null when not wanted, and for rms_norm
  void* rstd;            // (rows) float32 or float64; null when not wanted
  const void* input;     // (rows, cols) input_dtype
  const void* residual;  // (rows, cols) residual_dtype, or null
  const void* weight;    // (cols) weight_dtype, or null
  const void* bias;      // (cols) weight_dtype, or null; null for rms_norm
  int64_t rows, cols, input_stride, residual_stride;
  DType out_dtype, summed_dtype, input_dtype, residual_dtype, weight_dtype;
  double eps, weight_offset;
};

struct NormBackward {
  void* grad_x;             // (rows, cols) x_dtype
  void* grad_cast;          // (rows, cols) cast_dtype: the same gradient once more in another dtype, or null
  void* grad_weight;        // (cols) weight_dtype, or null when not wanted
  void* grad_bias;          // (cols) weight_dtype, or null when not wanted
  void* partials;           // scratch, (norm_backward_blocks, 2, cols) float32 or float64; null when neither is wanted
  const void* grad_out;     // (rows, cols) out_dtype
  const void* grad_summed;  // (rows, cols) x_dtype: the gradient that reached `summed` from elsewhere, or null
  const void* saved;        // (rows, cols) x in x_dtype, or, if from_output, `out` in out_dtype
  const void* mean;         // (rows); null for rms_norm, unread if from_output
  const void* rstd;         // (rows)
  const void* weight;       // (cols) weight_dtype, or null
  const void* bias;         // (cols) weight_dtype, or null; read only if from_output
  int64_t rows, cols, grad_out_stride, grad_summed_stride, saved_stride;
  DType x_dtype, cast_dtype, out_dtype, weight_dtype;
  double weight_offset;
  bool from_output;  // xhat = (out - bias) / (weight + weight_offset) instead of (x - mean) * rstd
};

namespace cpu {
void layer_norm_forward(const NormForward& args, Exec exec);
void rms_norm_forward(const NormForward& args, Exec exec);
void layer_norm_backward(const NormBackward& args, Exec exec);
void rms_norm_backward(const NormBackward& args, Exec exec);
// 0: the CPU keeps its partial sums itself, since a tensor for them costs more than a small call.
int64_t norm_backward_blocks(int64_t rows, int64_t cols, Exec exec);
}  // namespace cpu

namespace cuda {
void layer_norm_forward(const NormForward& args, Exec exec);
void rms_norm_forward(const NormForward& args, Exec exec);
void layer_norm_backward(const NormBackward& args, Exec exec);
void rms_norm_backward(const NormBackward& args, Exec exec);
// How many row blocks the weight gradients are cut into: the first dimension of NormBackward::partials.
int64_t norm_backward_blocks(int64_t rows, int64_t cols, Exec exec);
}  // namespace cuda

}  // namespace bigmodel
