// What both directions of the softmax on the CPU know of rows: their places, live ranges, parts, threads and scratch.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../ops/softmax.h"
#include "convert.h"
#include "memory.h"
#include "parallel.h"
#include "softmax_kernels.h"

namespace bigmodel::cpu {

// A part of a row and its exponentials, 512 KiB in float32, stay in the second-level cache; a chunk in the first.
// Matrices of at least this size are not in the second-level cache: the next row is asked for while this one is
// computed.
constexpr int64_t kFetchBytes = int64_t(1) << 20;
constexpr int64_t kStreamingBytes = int64_t(32) << 20;  // of a result that no cache holds
constexpr int64_t kSoftmaxPart = 65536, kSoftmaxChunk = 2048;

inline DType compute_of(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

inline char* at(void* base, DType dtype, int64_t index) { return static_cast<char*>(base) + index * size_of(dtype); }
inline const char* at(const void* base, DType dtype, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(dtype);
}

inline double value_of(const void* values, int64_t index, DType dtype) {
  return dtype == DType::float64 ? static_cast<const double*>(values)[index] : static_cast<const float*>(values)[index];
}
inline void set_value(void* values, int64_t index, DType dtype, double value) {
  if (dtype == DType::float64) static_cast<double*>(values)[index] = value;
  else static_cast<float*>(values)[index] = float(value);
}

inline int64_t parts_of(int64_t live) { return (live + kSoftmaxPart - 1) / kSoftmaxPart; }

// Elements of 1 to 8 bytes, `stride` of them apart, side by side.
inline void gather(void* to, const char* from, int64_t n, int64_t stride, int64_t size) {
  const auto copy = [&](auto* out) {
    using Element = std::remove_pointer_t<decltype(out)>;
    for (int64_t i = 0; i < n; ++i) out[i] = reinterpret_cast<const Element*>(from)[i * stride];
  };
  if (size == 1) copy(static_cast<uint8_t*>(to));
  else if (size == 2) copy(static_cast<uint16_t*>(to));
  else if (size == 4) copy(static_cast<uint32_t*>(to));
  else copy(static_cast<uint64_t*>(to));
}

// Scratch of one thread, aligned to a cache line. It keeps what it once had for its next call: given back, it would be
// mapped again page by page.
inline char* workspace(int64_t bytes) {
  static thread_local std::unique_ptr<char[]> kept;
  static thread_local int64_t kept_bytes = 0;
  if (bytes + 64 > kept_bytes) {
    kept.reset(new char[bytes + 64]);
    kept_bytes = bytes + 64;
  }
  return kept.get() + (64 - reinterpret_cast<uintptr_t>(kept.get()) % 64) % 64;
}

template <class Body>
void convert_chunks(int64_t n, Body body) {
  for (int64_t begin = 0; begin < n; begin += kSoftmaxChunk) body(begin, std::min(kSoftmaxChunk, n - begin));
}

class Rows;

// One row: where it lies, and the keys [first, last) that causal and window leave of it.
struct Row {
  int64_t index, head, position, first, last;
  RowDims coordinates;
  Row(const Rows& rows, int64_t index);
  Row(const Rows& rows, const RowDims& coordinates);
  Row next(const Rows& rows) const;
  int64_t live() const { return last - first; }
  int64_t begin(int64_t part) const { return first + part * kSoftmaxPart; }
  int64_t size(int64_t part) const { return std::min(kSoftmaxPart, last - begin(part)); }
  int64_t offset(const RowDims& strides) const {
    return coordinates.d[0] * strides.d[0] + coordinates.d[1] * strides.d[1] + coordinates.d[2] * strides.d[2] +
           coordinates.d[3] * strides.d[3];
  }

 private:
  void find_live(const Rows& rows);
};

class Rows {
 public:
  Rows(const SoftmaxRows& r, DType dtype, Exec exec)
      : r_(r), compute(compute_of(dtype)), rows(r.dims.d[0] * r.dims.d[1] * r.dims.d[2] * r.dims.d[3]),
        threads(useful_threads(exec.index, rows * r.keys)), fetches(rows * r.keys * size_of(dtype) >= kFetchBytes) {
    if (r.dropout_p > 0) {
      seed_ = *static_cast<const uint64_t*>(r.seed);
      threshold_ = uint32_t(std::min(double(UINT32_MAX), r.dropout_p * 0x1p32 + 0.5));
    }
  }

  // Scratch of one thread for parts of up to `n` keys, every array aligned to a cache line.
  struct Buffers {
    void *z, *e, *added, *factors, *grad, *gathered, *chunk;
    const void* mask_from = nullptr;
    int64_t mask_size = 0;
    Buffers(const Rows& rows, int64_t n) {
      const int64_t array = ((n + kSlack) * size_of(rows.compute) + 63) / 64 * 64;
      const int64_t chunk_bytes = (kSoftmaxChunk + kSlack) * 8;
      char* base = workspace(5 * array + 2 * chunk_bytes);
      void** arrays[] = {&z, &e, &added, &factors, &grad};
      for (void** one : arrays) *one = base, base += array;
      gathered = base;
      chunk = base + chunk_bytes;
    }
  };

 protected:
  friend struct Row;

  static const SoftmaxKernels& kernels_for(DType dtype) { return softmax_kernels(dtype); }
  static int64_t step_bytes(DType dtype) { return softmax_kernels(dtype).step * size_of(dtype); }

  // Whether a result of whole rows of `dtype` is stored past the caches, which would read it first: it is larger than
  // they are, its memory is there, and no cache line is shared.
  bool streams(const void* base, DType dtype) const {
    const int64_t bytes = rows * r_.keys * size_of(dtype);
    return bytes >= kStreamingBytes && r_.keys <= kSoftmaxPart && r_.keys % softmax_kernels(dtype).step == 0 &&
           r_.keys * size_of(dtype) % 64 == 0 && reinterpret_cast<uintptr_t>(base) % 64 == 0 && resident(base, bytes);
  }

  // What dropout multiplies the keys from `key` on by, in the arithmetic's type.
  const void* dropout_factors(const Row& row, int64_t key, int64_t n, Buffers& buffers) const {
    const int64_t skipped = key % 4, blocks = (r_.keys + 3) / 4;
    kernels_for(compute).dropout(buffers.factors, n + skipped, seed_, uint64_t(row.index * blocks + key / 4),
                                 threshold_, 1 / (1 - r_.dropout_p));
    return at(buffers.factors, compute, skipped);
  }

  // Calls body(first, last) on one range of rows for each thread, of equal shares of the work: a causal row has less of
  // it than those below, but its zeros have to be written too, which counts as an eighth.
  template <class Body>
  void for_each_row(Body body) const {
    const int64_t queries = r_.dims.d[3];
    const bool even = r_.left == kUnlimited && r_.right == kUnlimited;
    if (threads == 1 || even || rows >= 16 * threads * queries) return parallel_for(threads, rows, body);
    std::vector<int64_t> work(queries + 1);
    for (int64_t i = 0; i < queries; ++i)
      work[i + 1] = work[i] + Row(*this, RowDims{{0, 0, 0, i}}).live() + r_.keys / 8 + 1;
    const int64_t matrices = rows / queries;
    const auto boundary = [&](int64_t thread) {
      const double target = double(matrices) * double(work[queries]) * double(thread) / threads;
      const int64_t matrix = std::min(matrices, int64_t(target / double(work[queries])));
      const double rest = target - double(matrix) * double(work[queries]);
      return std::min(rows, matrix * queries + (std::lower_bound(work.begin(), work.end(), rest) - work.begin()));
    };
    parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
      const int64_t first = begin == 0 ? 0 : boundary(begin), last = end == threads ? rows : boundary(end);
      if (first < last) body(first, last);
    });
  }

  const SoftmaxRows& r_;

 public:
  const DType compute;
  const int64_t rows;
  const int threads;
  const bool fetches;

 private:
  uint64_t seed_ = 0;
  uint32_t threshold_ = 0;
};

inline Row::Row(const Rows& rows, int64_t row) : index(row) {
  for (int d = 3; d >= 0; --d) coordinates.d[d] = row % rows.r_.dims.d[d], row /= rows.r_.dims.d[d];
  find_live(rows);
}

inline Row::Row(const Rows& rows, const RowDims& where) : index(0), coordinates(where) {
  for (int d = 0; d < 4; ++d) index = index * rows.r_.dims.d[d] + where.d[d];
  find_live(rows);
}

inline Row Row::next(const Rows& rows) const {
  RowDims where = coordinates;
  for (int d = 3; d >= 0 && ++where.d[d] == rows.r_.dims.d[d] && d > 0; --d) where.d[d] = 0;
  Row row = *this;
  row.coordinates = where;
  ++row.index;
  row.find_live(rows);
  return row;
}

inline void Row::find_live(const Rows& rows) {
  const SoftmaxRows& r = rows.r_;
  head = coordinates.d[2];
  position = coordinates.d[3] + r.keys - r.dims.d[3];
  first = r.left == kUnlimited ? 0 : std::max<int64_t>(0, position - r.left);
  last = r.right == kUnlimited ? r.keys : std::min(r.keys, position + r.right + 1);
  first = std::min(first, r.keys);
  last = std::max(last, first);
}

}  // namespace bigmodel::cpu
