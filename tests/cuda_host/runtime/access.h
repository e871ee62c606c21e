#pragma once

#include <cstddef>
#include <cstdint>

#include "races.h"
#include "traffic.h"

namespace cuda_host {

extern Races races;
extern Traffic traffic;

// Every check of one access; `code` is where it returns to. Outside kernels it does nothing.
void check_access(uintptr_t address, size_t bytes, bool write, bool aligned, const void* code);
void copy_async(uintptr_t to_shared, uintptr_t from_global, size_t bytes, const void* code);

}  // namespace cuda_host
