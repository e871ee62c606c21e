// Work sharing over torch's own OpenMP threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace bigmodel::cpu {

// Below this many elements per thread, opening a parallel region costs more than it saves.
constexpr int64_t kGrainElements = 32768;

inline int useful_threads(int threads, int64_t elements) {
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, elements / kGrainElements)));
}

// Orders stores past the caches before whatever follows; other stores need no such thing.
inline void store_fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// Calls body(begin, end) on contiguous parts of [0, n). With one thread no parallel region is opened: in a forked
// DataLoader worker libgomp's threads do not exist and a region would wait for them for ever. body must not throw.
template <class Body>
void parallel_for(int threads, int64_t n, Body body) {
  threads = int(std::min<int64_t>(threads, n));
  if (threads <= 1) {
    if (n > 0) body(int64_t(0), n);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    int64_t count = omp_get_num_threads(), index = omp_get_thread_num();
    int64_t begin = n * index / count, end = n * (index + 1) / count;
    if (begin < end) body(begin, end);
  }
}

}  // namespace bigmodel::cpu
