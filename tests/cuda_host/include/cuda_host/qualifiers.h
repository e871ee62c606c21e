// CUDA's keywords and built-in variables. A `__shared__` variable becomes a thread-local one: those of a library lie in
// one block of memory, which the executor can save and bring back for every thread block. Device functions are inlined,
// as on a device, and must be: the compiler instruments no access that is a structure given to or taken from a call.
#pragma once

#include "cuda_host/executor.h"

#define __host__
#define __device__ __attribute__((always_inline))
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local

// The built-in variables are objects without contents whose members ask the executor, so that reading them is no
// access.
#define CUDA_HOST_VARIABLE(name, type, get)                      \
  constexpr struct {                                             \
    struct {                                                     \
      operator unsigned() const { return ::cuda_host::get().x; } \
    } x;                                                         \
    struct {                                                     \
      operator unsigned() const { return ::cuda_host::get().y; } \
    } y;                                                         \
    struct {                                                     \
      operator unsigned() const { return ::cuda_host::get().z; } \
    } z;                                                         \
    operator type() const { return ::cuda_host::get(); }         \
  } name{};
CUDA_HOST_VARIABLE(threadIdx, uint3, thread_index)
CUDA_HOST_VARIABLE(blockIdx, uint3, block_index)
CUDA_HOST_VARIABLE(blockDim, dim3, block_extent)
CUDA_HOST_VARIABLE(gridDim, dim3, grid_extent)
#undef CUDA_HOST_VARIABLE
constexpr int warpSize = 32;
