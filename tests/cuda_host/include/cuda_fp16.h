// IEEE half precision, converted by the compiler's _Float16.
#pragma once

#include "cuda_host/intrinsics.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline float __half2float(__half value) { return float(cuda_host::bits_as<_Float16>(value.bits)); }
inline __half __float2half_rn(float value) { return {cuda_host::bits_as<unsigned short>(_Float16(value))}; }
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
