// The backward pass of the softmax on the CPU, row by row.
#pragma once

#include <cstring>

#include "softmax_rows.h"

namespace bigmodel::cpu {
namespace {

class SoftmaxBackwardPass : Rows {
 public:
  SoftmaxBackwardPass(const SoftmaxBackward& a, Exec exec)
      : Rows(a.rows, a.scores_dtype, exec), a_(a),
        direct_(a.out_dtype == a.scores_dtype && a.rows.softcap == 0 && a.rows.dropout_p == 0 && !a.grad_mask),
        streaming_(direct_ && !a.rows.log && a.rows.left == kUnlimited && streams(a.grad_scores, a.scores_dtype)),
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
        if (streaming_) store_fence();
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
  const char* saved(const Row& row, int64_t key) const { return at(a_.saved, a_.out_dtype, row.index * r_.keys + key); }
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
    void* grad = direct_ ? grad_scores(row, key) : buffers.grad;
    Ahead g{from.g, 0}, y{from.y, 0};
    if (next && fetches) {
      g = {grad_out(*next, next->first), step_bytes(a_.out_dtype)};
      y = {saved(*next, next->first), step_bytes(a_.out_dtype)};
    }
    if (streaming_) return kernels.grad_apply_streaming(grad, from.g, from.y, n, r_.keys, d, r_.scale, g, y);
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
    if (!streaming_ || !parts) clear_around(row);
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
    const int64_t mask_rows = own.d[0] * own.d[1] * own.d[2] * own.d[3];
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
      int64_t& index = a_.mask_dims.d[d] == r_.dims.d[d] ? mask_row : member;
      where.d[d] = index % r_.dims.d[d];
      index /= r_.dims.d[d];
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
    const int64_t heads = r_.dims.d[2], queries = r_.dims.d[3];
    for (int64_t head = 0; head < heads; ++head) {
      double sum = 0;
      for (int64_t matrix = head; matrix < rows / std::max<int64_t>(queries, 1); matrix += heads)
        for (int64_t i = 0; i < queries; ++i) sum += shares_[matrix * queries + i];
      set_value(a_.grad_sinks, head, compute, sum);
    }
  }

  const SoftmaxBackward& a_;
  bool direct_, streaming_;
  std::vector<double> shares_;
};

}  // namespace
}  // namespace bigmodel::cpu
