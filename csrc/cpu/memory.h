// What the kernel knows of a buffer, and is told.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace bigmodel::cpu {

// Asks the kernel to back the aligned inside of a buffer with huge pages, where it has not been touched yet.
inline void advise_huge_pages(void* address, int64_t bytes) {
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(address) + huge - 1) & ~(huge - 1);
  uintptr_t end = (reinterpret_cast<uintptr_t>(address) + uintptr_t(bytes)) & ~(huge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Whether a buffer's memory is there already, judged by its first, middle and last page; else its first touch will make
// the kernel zero it.
inline bool resident(const void* address, int64_t bytes) {
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), first = reinterpret_cast<uintptr_t>(address);
  for (int64_t offset : {int64_t(0), bytes / 2, bytes - 1}) {
    unsigned char present = 0;
    void* begin = reinterpret_cast<void*>((first + uintptr_t(offset)) & ~(page - 1));
    if (mincore(begin, page, &present) != 0 || !(present & 1)) return false;
  }
  return true;
}

}  // namespace bigmodel::cpu
