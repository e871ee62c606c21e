// Softmax on the CPU: dtypes, masks, live ranges, threads and the order of every reduction. The arithmetic is in
// softmax.isa.cpp, the formulas in ops/softmax.h.
//
// Bytes per element that must move: forward read scores, write out; backward read y and grad_out, write grad_scores. A
// row is the work of one thread, which finds it in its cache for every pass but the first. Rows longer than kSoftmaxPart
// are cut into parts, counted from the first live key, and shared out by parts; their scores are read twice.
#include "../ops/softmax.h"

#include <cmath>
#include <cstring>

#include "softmax_rows.h"

namespace bigmodel::cpu {
namespace {

class Forward : Rows {
 public:
  Forward(const SoftmaxForward& a, Exec exec)
      : Rows(a.rows, a.scores_dtype, exec), a_(a), dtype_(a.scores_dtype), out_kernels_(kernels_for(a.out_dtype)),
        adjusts_(a.mask || a.slopes || a.rows.softcap != 0) {}

  void run() {
    if (r_.keys <= kSoftmaxPart || rows >= 4 * threads) {
      for_each_row([&](int64_t first, int64_t last) {
        Buffers buffers(*this, std::min(r_.keys, kSoftmaxPart));
        for (Row current(*this, first); current.index < last;) {
          const Row next = current.next(*this);
          row(current, buffers, next.index < last ? &next : nullptr);
          current = next;
        }
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
  struct Total {
    double peak = -INFINITY, sum = 0;
  };

  static double base(double peak) { return peak == -INFINITY ? 0 : peak; }

  // What a sum of exp(z - from) becomes when `to` is taken off instead.
  static double moved(double sum, double from, double to) {
    return from == -INFINITY ? sum : sum * std::exp(from - to);  // without a live score the sum is 0, or NaN
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
  char* probs_at(const Row& row, int64_t key) const {
    return at(a_.probs, a_.out_dtype, row.index * r_.keys + key);
  }

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
    if (next) ahead = {at(a_.scores, dtype_, next->offset(a_.scores_strides) + next->first), step_bytes(dtype_)};
    const SoftmaxKernels& kernels = kernels_for(dtype_);
    if (!adjusts_) return {scores, dtype_, r_.scale, kernels.peak(scores, n, r_.scale), ahead};
    const void* added = a_.mask ? mask(row, key, n, buffers) : nullptr;
    const double slope = a_.slopes ? value_of(a_.slopes, row.head, compute) : 0;
    const double peak =
        kernels.prepare(buffers.z, {scores, added, n, r_.scale, r_.softcap, slope, row.position - key});
    return {buffers.z, compute, 1, peak, ahead};
  }

  // The mask as what is added, in the arithmetic's type. Rows of a padding mask are the same one after another: the
  // last one is kept.
  const void* mask(const Row& row, int64_t key, int64_t n, Buffers& buffers) const {
    const int64_t size = a_.mask_dtype == kBool ? 1 : size_of(DType(a_.mask_dtype));
    const char* from =
        static_cast<const char*>(a_.mask) + (row.offset(a_.mask_strides) + key * a_.mask_key_stride) * size;
    if (a_.mask_dtype == int(compute) && a_.mask_key_stride == 1) return from;
    if (a_.mask_strides[3] == 0) n = std::min(kSoftmaxPart, r_.keys - key);
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
    return {from.peak, kernels_for(from.dtype).exp_sum(buffers.e, from.base, row.size(part), from.scale,
                                                       base(from.peak), from.ahead)};
  }

  void row(const Row& row, Buffers& buffers, const Row* next) const {
    const int64_t parts = parts_of(row.live());
    Source from{};
    Total total;
    for (int64_t part = 0; part < parts; ++part) {
      from = source(row, part, buffers, next);
      total = join(total, total_of(row, part, from, buffers));
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
  bool adjusts_;
};

class Backward : Rows {
 public:
  Backward(const SoftmaxBackward& a, Exec exec)
      : Rows(a.rows, a.scores_dtype, exec), a_(a),
        direct_(a.out_dtype == a.scores_dtype && a.rows.softcap == 0 && a.rows.dropout_p == 0 && !a.grad_mask),
        shares_(a.grad_sinks ? rows : 0) {}

  void run() {
    if (a_.grad_mask) {
      run_by_mask();
    } else if (r_.keys <= kSoftmaxPart || rows >= 4 * threads) {
      for_each_row([&](int64_t first, int64_t last) {
        Buffers buffers(*this, std::min(r_.keys, kSoftmaxPart));
        for (Row current(*this, first); current.index < last;) {
          const Row next = current.next(*this);
          row(current, buffers, nullptr, next.index < last ? &next : nullptr);
          current = next;
        }
      });
    } else {
      run_by_parts();
    }
    if (a_.grad_sinks) reduce_sinks();
  }

 private:
  const char* grad_out(const Row& row, int64_t key) const {
    return at(a_.grad_out, a_.out_dtype, row.offset(a_.grad_out_strides) + key);
  }
  const char* saved(const Row& row, int64_t key) const {
    return at(a_.saved, a_.out_dtype, row.index * r_.keys + key);
  }
  char* grad_scores(const Row& row, int64_t key) const {
    return at(a_.grad_scores, a_.scores_dtype, row.index * r_.keys + key);
  }

  void clear(const Row& row, int64_t begin, int64_t end) const {
    if (begin < end) std::memset(grad_scores(row, begin), 0, (end - begin) * size_of(a_.scores_dtype));
  }
  void clear_around(const Row& row) const {
    clear(row, 0, row.first);
    clear(row, row.last, r_.keys);
  }

  // g and y (or, with log, grad_out and out) as the kernels read them: in place, or widened into scratch.
  struct Source {
    const void *g, *y;
    DType dtype;
  };

  Source source(const Row& row, int64_t part, Buffers& buffers) const {
    const int64_t key = row.begin(part), n = row.size(part);
    if (direct_) return {grad_out(row, key), saved(row, key), a_.out_dtype};
    const Convert widen = convert_table().convert[int(compute)][int(a_.out_dtype)];
    widen(buffers.z, grad_out(row, key), n);
    widen(buffers.e, saved(row, key), n);
    if (r_.dropout_p > 0) kernels_for(compute).multiply(buffers.z, dropout_factors(row, key, n, buffers), n);
    return {buffers.z, buffers.e, compute};
  }

  double dot(const Row& row, int64_t part, const Source& from) const {
    const SoftmaxKernels& kernels = kernels_for(from.dtype);
    return r_.log ? kernels.sum(from.g, row.size(part)) : kernels.grad_dot(from.g, from.y, row.size(part));
  }

  // `grad_z` (in the arithmetic's type, from the first live key on) is added to, or null.
  void apply(const Row& row, int64_t part, const Source& from, double d, Buffers& buffers, char* grad_z,
             const Row* next) const {
    const int64_t key = row.begin(part), n = row.size(part);
    const SoftmaxKernels& kernels = kernels_for(from.dtype);
    void* grad = direct_ ? grad_scores(row, key) : buffers.extra;
    Ahead g{from.g, 0}, y{from.y, 0};
    if (next) {
      g = {grad_out(*next, next->first), step_bytes(a_.out_dtype)};
      y = {saved(*next, next->first), step_bytes(a_.out_dtype)};
    }
    if (r_.log) kernels.grad_log(grad, from.g, from.y, n, d);
    else kernels.grad_apply(grad, from.g, from.y, n, d, direct_ ? r_.scale : 1, g, y);
    if (direct_) return;
    if (grad_z) {
      char* sum = grad_z + part * kSoftmaxPart * size_of(compute);
      convert_table().add[int(compute)](sum, sum, grad, n);
    }
    if (r_.softcap != 0)
      convert_table().convert[int(compute)][int(a_.scores_dtype)](
          buffers.added, at(a_.scores, a_.scores_dtype, row.offset(a_.scores_strides) + key), n);
    if (r_.softcap != 0 || r_.scale != 1) kernels.grad_scores(grad, buffers.added, n, r_.scale, r_.softcap);
    convert_table().convert[int(a_.scores_dtype)][int(compute)](grad_scores(row, key), grad, n);
  }

  void row(const Row& row, Buffers& buffers, char* grad_z, const Row* next) {
    const int64_t parts = parts_of(row.live());
    clear_around(row);
    Source from{};
    double d = 0;
    for (int64_t part = 0; part < parts; ++part) {
      from = source(row, part, buffers);
      d += dot(row, part, from);
    }
    share(row, d);
    for (int64_t part = 0; part < parts; ++part) {
      if (parts > 1) from = source(row, part, buffers);
      apply(row, part, from, d, buffers, grad_z, next);
    }
  }

  void run_by_parts() {
    const int64_t parts = parts_of(r_.keys);
    std::vector<double> dots(rows * parts), joined(rows);
    auto each_part = [&](auto body) {
      parallel_for(threads, rows * parts, [&](int64_t first, int64_t last) {
        Buffers buffers(*this, kSoftmaxPart);
        for (int64_t i = first; i < last; ++i) {
          const Row row(*this, i / parts);
          if (i % parts < parts_of(row.live())) body(i, row, i % parts, buffers);
        }
      });
    };
    each_part([&](int64_t i, const Row& row, int64_t part, Buffers& buffers) {
      dots[i] = dot(row, part, source(row, part, buffers));
    });
    for (int64_t i = 0; i < rows; ++i) {
      const Row row(*this, i);
      clear_around(row);
      for (int64_t part = 0; part < parts; ++part) joined[i] += dots[i * parts + part];
      share(row, joined[i]);
    }
    each_part([&](int64_t i, const Row& row, int64_t part, Buffers& buffers) {
      apply(row, part, source(row, part, buffers), joined[i / parts], buffers, nullptr, nullptr);
    });
  }

  // The rows that share a row of the mask are taken one after another, and their gradients summed on the way. Where the
  // mask has few rows, each is summed in several blocks, as many as the shape asks for.
  void run_by_mask() {
    const RowDims& own = a_.mask_dims;
    const int64_t mask_rows = own[0] * own[1] * own[2] * own[3];
    if (mask_rows == 0) return;
    const int64_t members = rows / mask_rows;
    const int64_t blocks = std::clamp<int64_t>(64 / mask_rows, 1, std::max<int64_t>(members, 1));
    const int64_t bytes = r_.keys * size_of(compute);
    const bool in_place = blocks == 1 && a_.mask_keys == r_.keys;
    std::unique_ptr<char[]> partials;
    if (!in_place) partials.reset(new char[mask_rows * blocks * bytes]);
    char* const sums = in_place ? static_cast<char*>(a_.grad_mask) : partials.get();
    parallel_for(threads, mask_rows * blocks, [&](int64_t first, int64_t last) {
      Buffers buffers(*this, std::min(r_.keys, kSoftmaxPart));
      std::unique_ptr<char[]> group(new char[bytes]);
      for (int64_t i = first; i < last; ++i) {
        const int64_t block = i % blocks, end = members * (block + 1) / blocks;
        sum_block(i / blocks, members * block / blocks, end, sums + i * bytes, group.get(), buffers);
      }
    });
    if (!in_place) reduce_mask(mask_rows, blocks, sums);
  }

  // Adds members [first, last) of a mask row, in groups of 16 so that no sum is long.
  void sum_block(int64_t mask_row, int64_t first, int64_t last, char* sum, char* group, Buffers& buffers) {
    const int64_t bytes = r_.keys * size_of(compute);
    std::memset(sum, 0, bytes);
    for (int64_t begin = first; begin < last; begin += 16) {
      const bool only = first + 16 >= last;
      char* to = only ? sum : group;
      if (!only) std::memset(group, 0, bytes);
      for (int64_t i = begin; i < std::min(begin + 16, last); ++i) {
        const Row member(*this, coordinates(mask_row, i));
        row(member, buffers, to + member.first * size_of(compute), nullptr);
      }
      if (!only) convert_table().add[int(compute)](sum, sum, group, r_.keys);
    }
  }

  // The mask row says where in the dimensions that the mask has, the member where in those it is broadcast over.
  RowDims coordinates(int64_t mask_row, int64_t member) const {
    RowDims where;
    for (int d = 3; d >= 0; --d) {
      int64_t& index = a_.mask_dims[d] == r_.dims[d] ? mask_row : member;
      where[d] = index % r_.dims[d];
      index /= r_.dims[d];
    }
    return where;
  }

  void reduce_mask(int64_t mask_rows, int64_t blocks, char* sums) {
    const int64_t bytes = r_.keys * size_of(compute);
    parallel_for(useful_threads(threads, mask_rows * blocks * r_.keys), mask_rows, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        char* sum = sums + i * blocks * bytes;
        for (int64_t step = 1; step < blocks; step *= 2)
          for (int64_t block = 0; block + step < blocks; block += 2 * step)
            convert_table().add[int(compute)](sum + block * bytes, sum + block * bytes, sum + (block + step) * bytes,
                                              r_.keys);
        if (a_.mask_keys == r_.keys) std::memcpy(static_cast<char*>(a_.grad_mask) + i * bytes, sum, bytes);
        else set_value(a_.grad_mask, i, compute, kernels_for(compute).sum(sum, r_.keys));
      }
    });
  }

  void share(const Row& row, double d) {
    if (a_.grad_sinks) shares_[row.index] = -d * value_of(a_.sink_probs, row.index, compute);
  }

  void reduce_sinks() const {
    const int64_t heads = r_.dims[2], queries = r_.dims[3];
    for (int64_t head = 0; head < heads; ++head) {
      double sum = 0;
      for (int64_t matrix = head; matrix < rows / std::max<int64_t>(queries, 1); matrix += heads)
        for (int64_t i = 0; i < queries; ++i) sum += shares_[matrix * queries + i];
      set_value(a_.grad_sinks, head, compute, sum);
    }
  }

  const SoftmaxBackward& a_;
  bool direct_;
  std::vector<double> shares_;
};

}  // namespace

void softmax_forward(const SoftmaxForward& args, Exec exec) {
  if (args.rows.keys > 0) Forward(args, exec).run();
}

void softmax_backward(const SoftmaxBackward& args, Exec exec) { Backward(args, exec).run(); }

int64_t softmax_backward_scratch(int64_t, int64_t, bool, bool, Exec) { return 0; }

}  // namespace bigmodel::cpu
