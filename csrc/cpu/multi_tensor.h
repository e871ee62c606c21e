// How the multi-tensor ops go over their tensors on the CPU: one parallel region for a whole table, its work cut in
// equal parts across tensor borders, and every chunk handed to the kernel in the compute type.
//
// A stream that is stored otherwise (16 bits, 8-bit codes) is converted for one chunk into the first-level cache and
// back, so that each kernel is written and compiled for float and double only.
#pragma once

#include <algorithm>
#include <vector>

#include "../random.h"
#include "../table.h"
#include "convert.h"
#include "parallel.h"
#include "quantise.h"

namespace bigmodel::cpu {

// Of a row, from its first element on: whole blocks of 8-bit codes. 8 KiB of float32, so that the converted chunks of
// all streams stay in the first-level cache together.
constexpr int64_t kUpdateChunk = 2048;
constexpr int kMaxStreams = 8;

// What an op does with a stream.
struct Use {
  bool read, write;
  bool as_stored;          // the kernel converts 16-bit elements itself, if it computes in float
  int scales = -1;         // the stream that holds the scales, if it may be quantised
  bool is_signed = false;  // of 8-bit codes
};

struct Chunk {
  void* stream[kMaxStreams];  // n values; null where the row has no such stream
  DType dtype[kMaxStreams];   // of the values: the compute type but where a Use says as_stored
  int64_t row, n;
  bool wide;  // the compute type is double
};

// The scalar at an address that may be null.
template <class T>
double scalar_or(const T* address, double absent) {
  return address ? *address : absent;
}

inline bool found_inf(const GradControl& control) { return scalar_or(control.found_inf, 0) != 0; }

inline double gradient_factor(const GradControl& control) {
  double factor = scalar_or(control.factor, 1) / scalar_or(control.grad_scale, 1);
  return control.maximize ? -factor : factor;
}

inline double value_of(const Rate& rate) {
  if (!rate.pointer) return rate.value;
  return rate.dtype == DType::float64 ? *static_cast<const double*>(rate.pointer)
                                      : *static_cast<const float*>(rate.pointer);
}

// Adds 1 to a row's step and returns it.
inline double advance(const Table& table, int64_t row, int stream) {
  void* step = table.address(row, stream);
  if (table.format(row, stream) == int(DType::float64)) return *static_cast<double*>(step) += 1;
  return *static_cast<float*>(step) += 1;
}

// The work of a table as one line: a row is its elements and a fixed cost. Cut at multiples of `chunk` only.
class Line {
 public:
  Line(const Table& table, int64_t chunk) : table_(table), chunk_(chunk), first_(table.rows + 1) {
    for (int64_t row = 0; row < table.rows; ++row) {
      first_[row + 1] = first_[row] + table.elements(row) + kRowCost;
      elements_ += table.elements(row);
    }
  }
  int64_t elements() const { return elements_; }

  // Calls body(row, begin, end) for what part `index` of `count` has of each row.
  template <class Body>
  void part(int64_t index, int64_t count, Body body) const {
    const Place from = place(index, count), to = place(index + 1, count);
    for (int64_t row = from.row; row <= to.row && row < table_.rows; ++row) {
      const int64_t begin = row == from.row ? from.element : 0;
      const int64_t end = row == to.row ? to.element : table_.elements(row);
      if (begin < end) body(row, begin, end);
    }
  }

 private:
  static constexpr int64_t kRowCost = 64;  // in elements: what a tensor costs beside them

  struct Place { int64_t row, element; };

  Place place(int64_t index, int64_t count) const {
    if (index == count) return {table_.rows, 0};
    const int64_t at = first_.back() / count * index;
    const int64_t row = std::upper_bound(first_.begin(), first_.end(), at) - first_.begin() - 1;
    if (row == table_.rows) return {row, 0};
    return {row, std::min((at - first_[row]) / chunk_ * chunk_, table_.elements(row))};
  }

  const Table& table_;
  const int64_t chunk_;
  std::vector<int64_t> first_;
  int64_t elements_ = 0;
};

// Rounds one stream, where it is of 16 bits, stochastically.
struct Stochastic {
  int stream = -1;  // none
  uint64_t seed = 0;
  std::vector<int64_t> steps;  // of each row
};

// n elements of a row, from `begin` on, as they are stored and as the kernels want them.
struct Piece {
  const Table& table;
  int64_t row, begin, n;
  DType wanted;

  bool direct(int stream, const Use& use) const {
    const int format = table.format(row, stream);
    return format == int(wanted) ||
           (use.as_stored && wanted == DType::float32 && format != kQuantised && size_of(DType(format)) == 2);
  }
  char* stored(int stream) const {
    char* base = static_cast<char*>(table.address(row, stream));
    return base ? base + begin * bytes_of(table.format(row, stream)) : nullptr;
  }
  float* scales(const Use& use) const {
    return static_cast<float*>(table.address(row, use.scales)) + begin / kQuantBlock;
  }

  void load(char* to, int stream, const Use& use) const {
    const int format = table.format(row, stream);
    const char* from = stored(stream);
    if (format == kQuantised)
      quantise_table().load_codes(reinterpret_cast<float*>(to), reinterpret_cast<const uint8_t*>(from), scales(use), n,
                                  use.is_signed);
    else convert_table().convert[int(wanted)][format](to, from, n);
  }

  void store(const char* from, int stream, const Use& use, const Stochastic& stochastic) const {
    const int format = table.format(row, stream);
    char* to = stored(stream);
    if (format == kQuantised)
      quantise_table().store_codes(reinterpret_cast<uint8_t*>(to), scales(use), reinterpret_cast<const float*>(from), n,
                                   use.is_signed);
    else if (stream == stochastic.stream && size_of(DType(format)) == 2)
      // A chunk lies within 2^32 elements: both are powers of 2.
      quantise_table().round_stochastically[format](
          to, reinterpret_cast<const float*>(from), n,
          random_key(stochastic.seed, row, stochastic.steps[row], begin >> 32), begin);
    else convert_table().convert[format][int(wanted)](to, from, n);
  }
};

// The type that a row is computed in: double if one of the first `deciding` streams is stored so.
inline DType compute_dtype(const Table& table, int64_t row, int deciding) {
  for (int stream = 0; stream < deciding; ++stream)
    if (table.format(row, stream) == int(DType::float64)) return DType::float64;
  return DType::float32;
}

// Calls body(chunk) for all of every row: in chunks where a stream has to be converted, else in one piece for a thread.
template <int streams, class Body>
void update(const Table& table, const Use (&uses)[streams], int deciding, int threads, Body body,
            const Stochastic& stochastic = {}) {
  static_assert(streams <= kMaxStreams, "a table has 8 bits of format for each stream");
  const Line line(table, kUpdateChunk);
  threads = useful_threads(threads, line.elements());
  parallel_for(threads, threads, [&](int64_t first, int64_t last) {
    struct alignas(64) Scratch { char bytes[kUpdateChunk * sizeof(double)]; } scratch[streams];
    for (int64_t part = first; part < last; ++part)
      line.part(part, threads, [&](int64_t row, int64_t begin, int64_t end) {
        Piece piece{table, row, begin, end - begin, compute_dtype(table, row, deciding)};
        Chunk chunk{{}, {}, row, piece.n, piece.wanted == DType::float64};
        bool converts = false;
        for (int s = 0; s < streams; ++s) {
          chunk.stream[s] = piece.stored(s);
          const bool direct = piece.direct(s, uses[s]) && s != stochastic.stream;
          chunk.dtype[s] = direct ? DType(table.format(row, s)) : piece.wanted;
          converts |= chunk.stream[s] && !direct;
        }
        if (!converts) return body(chunk);
        for (; piece.begin < end; piece.begin += kUpdateChunk) {
          chunk.n = piece.n = std::min(kUpdateChunk, end - piece.begin);
          for (int s = 0; s < streams; ++s) {
            chunk.stream[s] = piece.stored(s);
            if (!chunk.stream[s] || (piece.direct(s, uses[s]) && s != stochastic.stream)) continue;
            chunk.stream[s] = scratch[s].bytes;
            if (uses[s].read) piece.load(scratch[s].bytes, s, uses[s]);
          }
          body(chunk);
          for (int s = 0; s < streams; ++s)
            if (uses[s].write && chunk.stream[s] == scratch[s].bytes)
              piece.store(scratch[s].bytes, s, uses[s], stochastic);
        }
      });
  });
}

}  // namespace bigmodel::cpu
