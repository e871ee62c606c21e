// What csrc/cpu/norm.cpp asks of csrc/cpu/norm.isa.cpp: kernels over one chunk of one row, all activations of one
// dtype, weight and bias already in the compute type with weight_offset added.
#pragma once

#include "../op.h"
#include "isa.h"

namespace bigmodel::cpu {

// A row is reduced chunk by chunk whatever its length and whoever computes it; 4096 float32 of x, weight and out are
// 48 KiB, the first-level cache of the smallest current server core.
constexpr int64_t kChunk = 4096;

struct Moments {
  double mean;    // 0 for rms_norm
  double square;  // sum of (x - mean)^2
};

struct NormChunk {
  void* out;
  const void* x;
  const void* weight;
  const void* bias;  // layer_norm only
  int64_t n;
  double mean, rstd;
  const void* next_x;  // the next row's, to be fetched; or any address
  bool streaming;      // store past the caches: out is aligned to 64 bytes
};

struct NormGradRow {
  const void* grad_out;
  const void* saved;  // x, or `out` if from_output
  double mean, rstd;
  // Of the second kernel only.
  void* grad_x;
  const void* grad_summed;  // or null
  double mean_g, mean_g_xhat;
  const void *next_grad_out, *next_saved;  // of the row that comes after, to be fetched; or any address
};

struct NormGradChunk {
  const void* weight;
  const void* bias;  // read only if from_output by layer_norm
  int64_t n;
  bool from_output;
  // Of the second kernel only.
  void* grad_weight;  // compute type, added to; or null
  void* grad_bias;    // compute type, added to; or null, and null for rms_norm
  bool streaming;     // store past the caches: grad_x is aligned to 64 bytes
};

// Two rows at once load and store the running weight gradients once.
constexpr int kRowsAtOnce = 2;

struct GradSums {
  double g;       // sum of g; 0 for rms_norm
  double g_xhat;  // sum of g * xhat
};

struct NormKernels {
  Moments (*moments)(const void* x, int64_t n);
  void (*apply)(const NormChunk& chunk);
  GradSums (*grad_sums)(const NormGradChunk& chunk, const NormGradRow& row);
  void (*grad_apply)(const NormGradChunk& chunk, const NormGradRow* rows, int count);  // count <= kRowsAtOnce
};

struct NormTable {
  NormKernels layer[kDTypes];
  NormKernels rms[kDTypes];
};

BIGMODEL_ISA_TABLE(NormTable, norm_table)

}  // namespace bigmodel::cpu
