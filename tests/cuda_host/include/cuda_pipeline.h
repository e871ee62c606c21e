// Asynchronous copies from global to shared memory. They land when they are waited for, not before.
#pragma once

#include "cuda_host/executor.h"

inline void __pipeline_memcpy_async(void* to_shared, const void* from_global, size_t bytes) {
  cuda_host::copy_async(to_shared, from_global, bytes);
}
inline void __pipeline_commit() { cuda_host::commit_copies(); }
inline void __pipeline_wait_prior(size_t groups) { cuda_host::wait_copies(groups); }
