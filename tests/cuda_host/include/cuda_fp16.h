// IEEE half precision, converted by the compiler.
#pragma once

#include "cuda_host/intrinsics.h"
#include "cuda_host/qualifiers.h"

namespace cuda_host {
#ifdef __aarch64__
using Half = __fp16;  // GCC knows _Float16 in C++ there from 13 on
#else
using Half = _Float16;
#endif
}  // namespace cuda_host

struct __half { unsigned short bits; };
struct alignas(4) __half2 { __half x, y; };

__device__ inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
__device__ inline unsigned short __half_as_ushort(__half value) { return value.bits; }
__device__ inline float __half2float(__half value) { return float(cuda_host::bits_as<cuda_host::Half>(value.bits)); }
__device__ inline __half __float2half_rn(float value) {
  return {cuda_host::bits_as<unsigned short>(cuda_host::Half(value))};
}
__device__ inline __half __float2half(float value) { return __float2half_rn(value); }
__device__ inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
__device__ inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
