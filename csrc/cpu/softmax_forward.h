// The forward pass of the softmax on the CPU, row by row.
#pragma once

#include <cmath>
#include <cstring>

#include "softmax_rows.h"

namespace bigmodel::cpu {
namespace {

class SoftmaxForwardPass : Rows {
 public:
  SoftmaxForwardPass(const SoftmaxForward& a, Exec exec)
      : Rows(a.rows, a.scores_dtype, exec), a_(a), dtype_(a.scores_dtype), out_kernels_(kernels_for(a.out_dtype)),
        adjusts_(a.mask || a.slopes || a.rows.softcap != 0),
        streaming_(a.out != a.scores && !a.probs && !a.rows.log && compute_of(a.out_dtype) == compute &&
                   streams(a.out, a.out_dtype)) {}

  void run() {
    if (r_.keys <= kSoftmaxPart || rows >= 4 * threads) {
      for_each_row([&](int64_t first, int64_t last) {
        Buffers buffers(*this, std::min(r_.keys, kSoftmaxPart));
        for (Row current(*this, first); current.index < last;) {
          const Row next = current.next(*this);
          row(current, buffers, next.index < last ? &next : nullptr);
          current = next;
        }
        if (streaming_) store_fence();
      });
      return;
    }
    // Few long rows: every part's own peak and sum, then theirs joined, then every part again.
    const int64_t parts = parts_of(r_.keys);
    std::vector<Total> totals(rows * parts), joined(rows);
    auto each_part = [&](auto body) {
      parallel_for(threads, rows * parts, [&](int64_t first, int64_t last) {
        Buffers buffers(*this, kSoftmaxPart);
        for (int64_t i = first; i < last; ++i) {
          Row row(*this, i / parts);
          if (i % parts < parts_of(row.live())) body(i, row, i % parts, buffers);
        }
      });
    };
    each_part([&](int64_t i, const Row& row, int64_t part, Buffers& buffers) {
      totals[i] = total_of(row, part, source(row, part, buffers, nullptr), buffers);
    });
    for (int64_t i = 0; i < rows; ++i) {
      const Row row(*this, i);
      for (int64_t part = 0; part < parts_of(row.live()); ++part) joined[i] = join(joined[i], totals[i * parts + part]);
      joined[i] = with_sink(row, joined[i]);
      fill_dead(row, joined[i]);
    }
    each_part([&](int64_t i, const Row& row, int64_t part, Buffers& buffers) {
      const Total total = joined[i / parts];
      if (dead(total)) return;
      const Source from = source(row, part, buffers, nullptr);
      if (!r_.log) total_of(row, part, from, buffers);
      finish(row, part, from, total, buffers);
    });
  }

 private:
  // The largest z, and the sum of exp(z - peak).
  struct Total { double peak = -INFINITY, sum = 0; };

  static double base(double peak) { return peak == -INFINITY ? 0 : peak; }

  // What a sum of exp(z - from) becomes when `to` is taken off instead.
  static double moved(double sum, double from, double to) {
    return from == -INFINITY || from == to ? sum : sum * std::exp(from - to);  // without a live score it is 0, or NaN
  }

  static Total join(Total left, Total right) {
    const double peak = std::fmax(left.peak, right.peak);
    return {peak, moved(left.sum, left.peak, peak) + moved(right.sum, right.peak, peak)};
  }

  Total with_sink(const Row& row, Total total) const {
    if (!a_.sinks) return total;
    const double sink = value_of(a_.sinks, row.head, compute);
    total = join(total, {sink, sink == -INFINITY ? 0.0 : 1.0});
    if (a_.sink_probs)
      set_value(a_.sink_probs, row.index, compute, dead(total) ? 0 : moved(1, sink, total.peak) / total.sum);
    return total;
  }

  bool dead(const Total& total) const { return total.sum == 0 && !r_.log; }

  char* out_at(const Row& row, int64_t key) const { return at(a_.out, a_.out_dtype, row.offset(a_.out_strides) + key); }
  char* probs_at(const Row& row, int64_t key) const { return at(a_.probs, a_.out_dtype, row.index * r_.keys + key); }

  void clear(const Row& row, int64_t begin, int64_t end) const {
    if (begin >= end) return;
    std::memset(out_at(row, begin), 0, (end - begin) * size_of(a_.out_dtype));
    if (a_.probs) std::memset(probs_at(row, begin), 0, (end - begin) * size_of(a_.out_dtype));
  }

  // What the parts do not write: all around the live range, and all of it in a row without live scores.
  void fill_dead(const Row& row, const Total& total) const {
    clear(row, 0, row.first);
    clear(row, row.last, r_.keys);
    if (!dead(total)) return;
    if (!a_.empty_is_nan) return clear(row, row.first, row.last);
    const double nan = NAN;
    for (int64_t key = row.first; key < row.last; ++key)
      convert_table().convert[int(a_.out_dtype)][int(DType::float64)](out_at(row, key), &nan, 1);
  }

  // The scores of a part as the kernels below read them: as they are, to be scaled; or z.
  struct Source {
    const void* base;
    DType dtype;
    double scale, peak;
    Ahead ahead;
  };

  Source source(const Row& row, int64_t part, Buffers& buffers, const Row* next) const {
    const int64_t key = row.begin(part), n = row.size(part);
    const char* scores = at(a_.scores, dtype_, row.offset(a_.scores_strides) + key);
    Ahead ahead{scores, 0};
    if (next && fetches)
      ahead = {at(a_.scores, dtype_, next->offset(a_.scores_strides) + next->first), step_bytes(dtype_)};
    const SoftmaxKernels& kernels = kernels_for(dtype_);
    if (!adjusts_) return {scores, dtype_, r_.scale, kernels.peak(scores, n, r_.scale), ahead};
    const void* added = a_.mask ? mask(row, key, n, buffers) : nullptr;
    const double slope = a_.slopes ? value_of(a_.slopes, row.head, compute) : 0;
    const double peak = kernels.prepare(buffers.z, {scores, added, n, r_.scale, r_.softcap, slope, row.position - key});
    return {buffers.z, compute, 1, peak, ahead};
  }

  // The mask as what is added, in the arithmetic's type. Rows of a padding mask are the same one after another: the
  // last one is kept.
  const void* mask(const Row& row, int64_t key, int64_t n, Buffers& buffers) const {
    const int64_t size = a_.mask_dtype == kBool ? 1 : size_of(DType(a_.mask_dtype));
    const char* from =
        static_cast<const char*>(a_.mask) + (row.offset(a_.mask_strides) + key * a_.mask_key_stride) * size;
    if (a_.mask_dtype == int(compute) && a_.mask_key_stride == 1) return from;
    if (a_.mask_strides.d[3] == 0) n = std::min(kSoftmaxPart, r_.keys - key);
    if (buffers.mask_from == from && buffers.mask_size >= n) return buffers.added;
    buffers.mask_from = from;
    buffers.mask_size = n;
    for (int64_t begin = 0; begin < n; begin += kSoftmaxChunk) {
      const int64_t count = std::min(kSoftmaxChunk, n - begin);
      const char* chunk = from + begin * a_.mask_key_stride * size;
      if (a_.mask_key_stride != 1) {
        gather(buffers.gathered, chunk, count, a_.mask_key_stride, size);
        chunk = static_cast<const char*>(buffers.gathered);
      }
      char* to = static_cast<char*>(buffers.added) + begin * size_of(compute);
      if (a_.mask_dtype == kBool) kernels_for(compute).spread(to, chunk, count);
      else convert_table().convert[int(compute)][a_.mask_dtype](to, chunk, count);
    }
    return buffers.added;
  }

  // Leaves e in its buffer.
  Total total_of(const Row& row, int64_t part, const Source& from, Buffers& buffers) const {
    return {
        from.peak,
        kernels_for(from.dtype).exp_sum(buffers.e, from.base, row.size(part), from.scale, base(from.peak), from.ahead)};
  }

  void row(const Row& row, Buffers& buffers, const Row* next) const {
    if (streaming_) return streamed_row(row, buffers, next);
    const int64_t parts = parts_of(row.live());
    Source from{};
    Total total;
    for (int64_t part = 0; part < parts; ++part) {
      from = source(row, part, buffers, next);
      const Total own = total_of(row, part, from, buffers);
      total = part == 0 ? own : join(total, own);
    }
    total = with_sink(row, total);
    fill_dead(row, total);
    if (dead(total)) return;
    if (parts == 1) return finish(row, 0, from, total, buffers);
    for (int64_t part = 0; part < parts; ++part) {
      from = source(row, part, buffers, nullptr);
      if (!r_.log) total_of(row, part, from, buffers);
      finish(row, part, from, total, buffers);
    }
  }

  // The zeros around the live range go through the buffer, so that every line of the row is written as a whole.
  void streamed_row(const Row& row, Buffers& buffers, const Row* next) const {
    const Source from = source(row, 0, buffers, next);
    char* e = at(buffers.e, compute, 0);
    const double sum =
        kernels_for(from.dtype)
            .exp_sum(at(buffers.e, compute, row.first), from.base, row.live(), from.scale, base(from.peak), from.ahead);
    const Total total = with_sink(row, {from.peak, sum});
    if (dead(total)) return fill_dead(row, total);
    std::memset(e, 0, row.first * size_of(compute));
    std::memset(at(buffers.e, compute, row.last), 0, (r_.keys - row.last) * size_of(compute));
    out_kernels_.finish_streaming(out_at(row, 0), e, r_.keys, moved(1, from.peak, total.peak) / total.sum);
  }

  void finish(const Row& row, int64_t part, const Source& from, const Total& total, Buffers& buffers) const {
    if (r_.log) finish_log(row, part, from, total, buffers);
    else finish_exp(row, part, moved(1, from.peak, total.peak) / total.sum, buffers);
  }

  void finish_log(const Row& row, int64_t part, const Source& from, const Total& total, Buffers& buffers) const {
    const SoftmaxKernels& kernels = kernels_for(from.dtype);
    const double peak = base(total.peak);
    const double log_sum = std::log(total.sum);
    char* to = out_at(row, row.begin(part));
    if (from.dtype == a_.out_dtype) return kernels.finish_log(to, from.base, row.size(part), from.scale, peak, log_sum);
    convert_chunks(row.size(part), [&](int64_t begin, int64_t n) {
      convert_table().convert[int(compute)][int(from.dtype)](buffers.chunk, at(from.base, from.dtype, begin), n);
      kernels_for(compute).finish_log(buffers.chunk, buffers.chunk, n, from.scale, peak, log_sum);
      convert_table().convert[int(a_.out_dtype)][int(compute)](at(to, a_.out_dtype, begin), buffers.chunk, n);
    });
  }

  // out (and y, if dropout changes it) from e.
  void finish_exp(const Row& row, int64_t part, double factor, Buffers& buffers) const {
    const int64_t key = row.begin(part), n = row.size(part);
    const void* factors = nullptr;
    if (a_.probs) {
      store(probs_at(row, key), n, nullptr, factor, buffers);
      factors = dropout_factors(row, key, n, buffers);
    }
    store(out_at(row, key), n, factors, factor, buffers);
  }

  void store(char* to, int64_t n, const void* factors, double factor, Buffers& buffers) const {
    if (compute_of(a_.out_dtype) == compute) return out_kernels_.finish(to, buffers.e, factors, n, factor);
    convert_chunks(n, [&](int64_t begin, int64_t count) {
      kernels_for(compute).finish(buffers.chunk, at(buffers.e, compute, begin),
                                  factors ? at(factors, compute, begin) : nullptr, count, factor);
      convert_table().convert[int(a_.out_dtype)][int(compute)](at(to, a_.out_dtype, begin), buffers.chunk, count);
    });
  }

  const SoftmaxForward& a_;
  DType dtype_;
  const SoftmaxKernels& out_kernels_;
  bool adjusts_, streaming_;
};

}  // namespace
}  // namespace bigmodel::cpu
