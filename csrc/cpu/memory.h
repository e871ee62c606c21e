// What the kernel knows of a buffer.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace bigmodel::cpu {

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
