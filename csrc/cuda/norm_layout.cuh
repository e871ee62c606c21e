// How a row is spread over threads, the same in every kernel of the norms and a function of its length and of the size
// of x's elements alone: so the order of a row's sums, and its bits, depend on nothing else, neither on the number of
// rows nor on alignment.
//
// A row is cut into packs of 16 bytes of x, packs into chunks of lanes * kPacks, one chunk for each block of a cluster.
// A thread holds the packs lane, lane + lanes, ... of its chunk, so neighbours touch neighbouring addresses.
#pragma once

#include "common.cuh"
#include "pack.cuh"

namespace bigmodel::cuda {

constexpr int kPacks = 4;  // of a thread: 64 bytes in flight each, 64 KiB on an SM that holds 1024 threads

template <class T>
constexpr int kElements = kPackBytes / int(sizeof(T));

struct Layout {
  int lanes;       // threads of a row in one block: a power of two up to a warp, or whole warps
  int64_t chunks;  // 1, 2, 4, 8 (the sizes of a cluster), or any number above

  Layout(int64_t cols, int64_t element_bytes) {
    const int64_t packs = divide_up(cols * element_bytes, kPackBytes);
    chunks = divide_up(packs, kMaxThreads * kPacks);
    if (chunks <= kMaxCluster) chunks = power_of_two_from(chunks);
    const int64_t wanted = divide_up(packs, chunks * kPacks);
    lanes = int(wanted <= kWarp ? power_of_two_from(wanted) : divide_up(wanted, kWarp) * kWarp);
  }

  // Rows that lie side by side in a block of at least `threads` threads.
  int rows_in(int threads) const { return std::max(1, threads / lanes); }

  static constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static constexpr int64_t power_of_two_from(int64_t n) {
    int64_t power = 1;
    while (power < n) power *= 2;
    return power;
  }
};

// The columns of the calling thread's packs of E elements, in a row that lies in one chunk per block.
template <int E>
struct Columns {
  int first, step, end;
  __device__ Columns(int chunk, int64_t cols)
      : first((chunk * kPacks * int(blockDim.x) + int(threadIdx.x)) * E), step(int(blockDim.x) * E), end(int(cols)) {}
  __device__ int at(int k) const { return first + k * step; }
  __device__ bool has(int k) const { return at(k) < end; }
};

}  // namespace bigmodel::cuda
