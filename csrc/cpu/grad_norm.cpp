// The norm of many gradients on the CPU: one pass that reads, 4 bytes per element in float32; clipping alone is one
// that reads and writes. The arithmetic is in grad_norm.isa.cpp, the formulas are in ops/grad_norm.h.
#include "../ops/grad_norm.h"

#include <cmath>

#include "grad_norm_kernels.h"
#include "multi_tensor.h"

namespace bigmodel::cpu {
namespace {

constexpr int64_t kNormChunk = 16384;

constexpr Use kUses[kGradStreams] = {{true, true, false}};

double join(double a, double b, int power) {
  if (power != 0) return a + b;
  return a > b || a != a ? a : b;
}

double norm_of(const GradClip& a) {
  const double norm = a.power == 2 ? std::sqrt(*a.total) : *a.total;
  return norm / scalar_or(a.grad_scale, 1);
}

}  // namespace

void grad_total(const GradTotal& a, Exec exec) {
  const Line line(a.table, kNormChunk);
  const int threads = useful_threads(exec.index, line.elements());
  std::vector<int64_t> first(a.table.rows + 1);  // partial sum of a row
  for (int64_t row = 0; row < a.table.rows; ++row)
    first[row + 1] = first[row] + (a.table.elements(row) + kNormChunk - 1) / kNormChunk;
  std::vector<double> partials(first.back());
  const auto& kernels = grad_norm_table().total[a.power];
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      line.part(part, threads, [&](int64_t row, int64_t from, int64_t to) {
        const int format = a.table.format(row, kGradValue);
        const char* values = static_cast<const char*>(a.table.address(row, kGradValue));
        for (int64_t at = from; at < to; at += kNormChunk)
          partials[first[row] + at / kNormChunk] =
              kernels[format](values + at * bytes_of(format), std::min(kNormChunk, to - at));
      });
  });
  double total = 0;
  for (double partial : partials) total = join(total, partial, a.power);
  *a.total = total;
}

void grad_clip(const GradClip& a, Exec) {
  const double norm = norm_of(a);
  const bool skip = scalar_or(a.found_inf, 0) != 0 || (a.skip_nonfinite && !std::isfinite(norm));
  if (a.norm_dtype == DType::float64) *static_cast<double*>(a.norm) = norm;
  else *static_cast<float*>(a.norm) = float(norm);
  const double factor = a.max_norm / (norm + 1e-6);
  *a.factor = factor > 1 ? 1 : factor;
  *a.skip = skip;
  if (a.skipped) *a.skipped += skip;
}

void grad_scale(const GradScale& a, Exec exec) {
  const double factor = *a.factor;
  if (factor == 1) return;
  const GradNormTable& kernels = grad_norm_table();
  update(a.table, kUses, kGradStreams, exec.index,
         [&](const Chunk& chunk) { kernels.scale[chunk.wide](chunk.stream, chunk.n, factor); });
}

int64_t grad_total_partials(const Table&) { return 0; }

}  // namespace bigmodel::cpu
