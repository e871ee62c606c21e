// bfloat16: the upper half of a float32, rounded to nearest, ties to even.
#pragma once

#include "cuda_host/intrinsics.h"
#include "cuda_host/qualifiers.h"

struct __nv_bfloat16 { unsigned short bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

__device__ inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
__device__ inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
__device__ inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
__device__ inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
__device__ inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
__device__ inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
__device__ inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
  return {__bfloat162float(pair.x), __bfloat162float(pair.y)};
}
