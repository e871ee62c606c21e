// How the multi-tensor ops go over their tensors on CUDA. The table travels in the kernel's arguments, as many rows at
// once as 30 KiB hold, so nothing is copied to the device and a captured graph keeps it. A block takes one chunk of one
// row; a warp takes two packs of each lane at once, 256 elements, so that many loads are on their way and a block of
// 8-bit codes lies in one warp.
//
// A lane's pack is 16 bytes of the compute type. Where every stream of a row has 16 bits, a lane's two packs lie side
// by side and move as one word of 16 bytes; beside wider streams those of fewer bits move fewer bytes in the same
// order, so that no sector is touched twice. An address that does not allow it is read element by element.
//
// An op is a struct with
//   kStreams, use(stream)        the streams that are loaded and stored, and how
//   kFormats, kColumns           the streams that have formats, and all columns of addresses
//   kDeciding                    a row is computed in float64 if one of that many streams is
//   kStep                        the column that prepare() advances, or -1
//   kQuantisable, kRounds        whether streams may be 8-bit codes, and be rounded stochastically
//   Args                         with `control` and `scratch`
//   prepare(args, step, format, scratch)   what is computed once per row
//   Op(args, scratch, prepared)  the scalars of a row
//   idle()                       whether nothing would change
//   rounds(dtype), key(row, high)          stochastic rounding
//   operator()(x, present)       the update of one element: x[stream], of the streams whose bit is set in `present`
#pragma once

#include "../random.h"
#include "../table.h"
#include "common.cuh"
#include "stored.cuh"

namespace bigmodel::cuda {

constexpr int kUpdateThreads = 128;
constexpr int kUpdateChunk = 16384;  // of a row: 2^32 is a multiple, and it is whole blocks of 8-bit codes
constexpr int kPacksAtOnce = 2;
constexpr int kScratchPerRow = 4;

struct Use {
  bool read, write;
  int scales = -1;         // the column that holds the scales, if the stream may be quantised
  bool is_signed = false;  // of 8-bit codes
  bool rounded = false;    // stochastically, where the args say so
};

template <int columns>
struct Part {
  static constexpr int kRows = 30720 / (16 + 8 * columns);
  int64_t first_row;
  int rows, blocks;
  int64_t elements[kRows];
  uint32_t formats[kRows];  // 4 bits for each stream
  int first_block[kRows];
  void* address[columns][kRows];

  BIGMODEL_SHARED int format(int row, int stream) const { return int(formats[row] >> (4 * stream) & 15); }
};

// Whether a row is computed in float64: if one of the first kDeciding streams is stored so.
template <class Op>
BIGMODEL_SHARED bool is_wide(uint32_t formats) {
  for (int s = 0; s < Op::kDeciding; ++s)
    if ((formats >> (4 * s) & 15) == uint32_t(DType::float64)) return true;
  return false;
}

// Whether prepare() runs: a table's rows all have what it advances, or none has.
template <class Op>
BIGMODEL_SHARED bool is_prepared(const Part<Op::kColumns>& part) {
  if constexpr (Op::kStep < 0) return false;
  else return part.address[Op::kStep][0] != nullptr;
}

// Calls launch(part) for as many rows at once as a part holds.
template <int columns, class Launch>
void for_each_part(const Table& table, int streams, int chunk, Launch launch) {
  for (int64_t first = 0; first < table.rows; first += Part<columns>::kRows) {
    Part<columns> part;
    part.first_row = first;
    part.rows = int(std::min<int64_t>(table.rows - first, Part<columns>::kRows));
    part.blocks = 0;
    for (int i = 0; i < part.rows; ++i) {
      const int64_t row = first + i;
      part.elements[i] = table.elements(row);
      part.formats[i] = 0;
      for (int s = 0; s < streams; ++s) part.formats[i] |= uint32_t(table.format(row, s)) << (4 * s);
      for (int c = 0; c < columns; ++c) part.address[c][i] = table.address(row, c);
      part.first_block[i] = part.blocks;
      part.blocks += int((part.elements[i] + chunk - 1) / chunk);
    }
    launch(part);
  }
}

// The row that the calling block has a chunk of: the last that begins at it or before.
template <int columns>
__device__ int row_of_block(const Part<columns>& part) {
  int low = 0, high = part.rows;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (part.first_block[middle] <= int(blockIdx.x) ? low : high) = middle;
  }
  return low;
}

template <class T>
__device__ double scalar_or(const T* address, double absent) {
  return address ? *address : absent;
}

__device__ inline bool found_inf(const GradControl& control) { return scalar_or(control.found_inf, 0) != 0; }

__device__ inline double gradient_factor(const GradControl& control) {
  const double factor = scalar_or(control.factor, 1) / scalar_or(control.grad_scale, 1);
  return control.maximize ? -factor : factor;
}

__device__ inline double value_of(const Rate& rate) {
  if (!rate.pointer) return rate.value;
  return rate.dtype == DType::float64 ? *static_cast<const double*>(rate.pointer)
                                      : *static_cast<const float*>(rate.pointer);
}

// Adds 1 to a step and returns it.
__device__ inline double advance(void* step, int format) {
  if (format == int(DType::float64)) return *static_cast<double*>(step) += 1;
  return *static_cast<float*>(step) += 1;
}

// --- the kernels -----------------------------------------------------------------------------------------------------

// What is computed once per row: one thread each.
template <class Op>
__global__ void __launch_bounds__(kWarp) prepare(const __grid_constant__ Part<Op::kColumns> part,
                                     const __grid_constant__ typename Op::Args args) {
  const int row = blockIdx.x * kWarp + threadIdx.x;
  if (row >= part.rows || found_inf(args.control)) return;
  Op::prepare(args, part.address[Op::kStep][row], part.format(row, Op::kStep),
              static_cast<double*>(args.scratch) + (part.first_row + row) * kScratchPerRow);
}

template <class Op, class C>
__global__ void __launch_bounds__(kUpdateThreads, 3) update(const __grid_constant__ Part<Op::kColumns> part,
                                    const __grid_constant__ typename Op::Args args) {
  constexpr int S = Op::kStreams, U = kPacksAtOnce, E = kPackElements<C>;
  constexpr bool kNarrow = std::is_same_v<C, float>, kCodes = Op::kQuantisable && kNarrow;
  const int row = row_of_block(part);
  if (is_wide<Op>(part.formats[row]) != std::is_same_v<C, double> || found_inf(args.control)) return;
  const double* const scratch = static_cast<const double*>(args.scratch) + (part.first_row + row) * kScratchPerRow;
  const Op op(args, scratch, is_prepared<Op>(part));
  if (op.idle()) return;

  __shared__ DynamicCode codes[2];
  if constexpr (kCodes) {
    constexpr int kWords = int(sizeof(codes) / sizeof(float));
    for (int i = threadIdx.x; i < kWords; i += kUpdateThreads)
      reinterpret_cast<float*>(codes)[i] = reinterpret_cast<const float*>(kDynamicCodes)[i];
    __syncthreads();
  }

  const int64_t begin = int64_t(int(blockIdx.x) - part.first_block[row]) * kUpdateChunk;
  const int n = int(min(int64_t(kUpdateChunk), part.elements[row] - begin));
  int format[S];
  char* base[S];
  uint32_t present = 0;
  bool paired = kNarrow;  // a lane's packs lie side by side
#pragma unroll
  for (int s = 0; s < S; ++s) {
    format[s] = part.format(row, s);
    base[s] = static_cast<char*>(part.address[s][row]);
    present |= uint32_t(base[s] != nullptr) << s;
    if (base[s]) paired &= bytes_of(format[s]) == 2;
    base[s] += begin * bytes_of(format[s]);
  }
  const auto has = [&](int s) { return (present >> s & 1) != 0; };
  const auto scale_of = [&](int s, int first) {
    return static_cast<float*>(part.address[Op::use(s).scales][row]) + (begin + first) / kQuantBlock;
  };

  const auto is_quantised = [&](int s) { return kCodes && Op::use(s).scales >= 0 && format[s] == kQuantised; };
  uint64_t key = 0;
  if constexpr (Op::kRounds) key = op.key(part.first_row + row, begin >> 32);

  const int lane = threadIdx.x % kWarp;
  for (int first = threadIdx.x / kWarp * (kWarp * U * E); first < n; first += kUpdateThreads * U * E) {
    const auto at = [&](int u) { return first + (paired ? lane * U + u : u * kWarp + lane) * E; };
    const auto count = [&](int u) { return max(0, min(E, n - at(u))); };
    const auto in_one = [&](int s) {
      return paired && count(U - 1) == E && reinterpret_cast<uintptr_t>(base[s]) % kPackBytes == 0;
    };
    Raw raw[S][U];
#pragma unroll
    for (int s = 0; s < S; ++s) {
#pragma unroll
      for (int u = 0; u < U; ++u) raw[s][u] = Raw{};
      if (!Op::use(s).read || !has(s)) continue;
      if constexpr (kNarrow) {
        if (in_one(s)) {
          load_pair(raw[s], reinterpret_cast<const uint16_t*>(base[s]) + at(0));
          continue;
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (count(u) > 0) raw[s][u] = load_raw(Tag<C>{}, base[s] + at(u) * bytes_of(format[s]), format[s], count(u));
    }

    C value[S][U][E];
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        if (is_quantised(s)) load_codes(value[s][u], raw[s][u], codes[Op::use(s).is_signed], *scale_of(s, first));
        else widen_raw(value[s][u], raw[s][u], format[s]);
      }
#pragma unroll
      for (int e = 0; e < E; ++e) {
        C x[S];
#pragma unroll
        for (int s = 0; s < S; ++s) x[s] = value[s][u][e];
        op(x, present);
#pragma unroll
        for (int s = 0; s < S; ++s) value[s][u][e] = x[s];
      }
    }
#pragma unroll
    for (int s = 0; s < S; ++s) {
      if (!Op::use(s).write || !has(s) || is_quantised(s)) continue;
      const DType dtype = DType(format[s]);
      if constexpr (Op::kRounds && kNarrow) {
        if (Op::use(s).rounded && op.rounds(dtype)) {
#pragma unroll
          for (int u = 0; u < U; ++u)
#pragma unroll
            for (int e = 0; e < E; ++e)
              value[s][u][e] = cut(value[s][u][e], random_bits(uint32_t(begin + at(u) + e), key), dtype);
        }
      }
      if constexpr (kNarrow) {
        if (in_one(s)) {
          store_pair(reinterpret_cast<uint16_t*>(base[s]) + at(0), dtype, value[s]);
          continue;
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (count(u) > 0) store_any(base[s] + at(u) * bytes_of(format[s]), dtype, 0, value[s][u], count(u));
    }
    if constexpr (kCodes) {
#pragma unroll
      for (int s = 0; s < S; ++s)
        if (is_quantised(s))
          store_codes(reinterpret_cast<uint8_t*>(base[s]), scale_of(s, first), value[s], codes[Op::use(s).is_signed],
                      at, count);
    }
  }
}

// One step of an op over a whole table.
template <class Op>
void run(const Table& table, const typename Op::Args& args, Exec exec, const char* name) {
  const DeviceGuard guard(name, exec.index);
  for_each_part<Op::kColumns>(table, Op::kFormats, kUpdateChunk, [&](const Part<Op::kColumns>& part) {
    if (is_prepared<Op>(part))
      if constexpr (Op::kStep >= 0)
        launch(prepare<Op>, dim3((part.rows + kWarp - 1) / kWarp), dim3(kWarp), 0, 1, exec.stream, name, part, args);
    if (part.blocks == 0) return;
    bool wide = false, narrow = false;
    for (int row = 0; row < part.rows; ++row) (is_wide<Op>(part.formats[row]) ? wide : narrow) = true;
    const dim3 grid(part.blocks), block(kUpdateThreads);
    if (narrow) launch(update<Op, float>, grid, block, 0, 1, exec.stream, name, part, args);
    if (wide) launch(update<Op, double>, grid, block, 0, 1, exec.stream, name, part, args);
  });
}

}  // namespace bigmodel::cuda
