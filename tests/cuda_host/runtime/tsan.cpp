// What -fsanitize=thread calls before every access, and the memory functions that the linker's --wrap sends here.
#include <cstring>

#include "access.h"

namespace {

void check(const void* address, size_t bytes, bool write, bool aligned, const void* code) {
  cuda_host::check_access(reinterpret_cast<uintptr_t>(address), bytes, write, aligned, code);
}

}  // namespace

#define CUDA_HOST_ACCESS(bytes)                                                                               \
  void __tsan_read##bytes(void* address) { check(address, bytes, false, true, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* address) { check(address, bytes, true, true, __builtin_return_address(0)); }

extern "C" {

CUDA_HOST_ACCESS(1)
CUDA_HOST_ACCESS(2)
CUDA_HOST_ACCESS(4)
CUDA_HOST_ACCESS(8)
CUDA_HOST_ACCESS(16)

void __tsan_init() {}
// The guard of a static variable in host code.
char __tsan_atomic8_load(const volatile char* guard, int) { return __atomic_load_n(guard, __ATOMIC_ACQUIRE); }

void __tsan_read_range(void* address, size_t bytes) {
  check(address, bytes, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  check(address, bytes, true, false, __builtin_return_address(0));
}

void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  check(from, bytes, false, false, __builtin_return_address(0));
  check(to, bytes, true, false, __builtin_return_address(0));
  return std::memcpy(to, from, bytes);
}

void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  check(from, bytes, false, false, __builtin_return_address(0));
  check(to, bytes, true, false, __builtin_return_address(0));
  return std::memmove(to, from, bytes);
}

void* __wrap_memset(void* to, int value, size_t bytes) {
  check(to, bytes, true, false, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}

}  // extern "C"
