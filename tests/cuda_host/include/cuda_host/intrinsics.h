// Device functions: meetings of a block or warp, loads and stores with cache hints, bit casts, arithmetic.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_host/executor.h"
#include "cuda_host/qualifiers.h"

// --- meetings --------------------------------------------------------------------------------------------------------
inline void __syncthreads(cuda_host::Site site = cuda_host::here()) {
  cuda_host::sync_block(cuda_host::Vote::none, 0, site);
}
inline int __syncthreads_count(int predicate, cuda_host::Site site = cuda_host::here()) {
  return cuda_host::sync_block(cuda_host::Vote::count, predicate, site);
}
inline int __syncthreads_and(int predicate, cuda_host::Site site = cuda_host::here()) {
  return cuda_host::sync_block(cuda_host::Vote::all, predicate, site);
}
inline int __syncthreads_or(int predicate, cuda_host::Site site = cuda_host::here()) {
  return cuda_host::sync_block(cuda_host::Vote::any, predicate, site);
}
inline void __syncwarp(unsigned mask = ~0u, cuda_host::Site site = cuda_host::here()) {
  cuda_host::meet_warp(cuda_host::WarpOperation::sync, "__syncwarp", mask, 0, 0, site);
}

namespace cuda_host {

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = meet_warp(WarpOperation::shuffle, name, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned vote(const char* name, unsigned mask, int predicate, Site site) {
  return unsigned(meet_warp(WarpOperation::ballot, name, mask, predicate != 0, 0, site));
}

}  // namespace cuda_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, cuda_host::Site site = cuda_host::here()) {
  const unsigned first = cuda_host::lane_index() & ~unsigned(width - 1);
  return cuda_host::shuffle("__shfl_sync", mask, value, first + (unsigned(source) & unsigned(width - 1)), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, cuda_host::Site site = cuda_host::here()) {
  const unsigned lane = cuda_host::lane_index(), within = lane & unsigned(width - 1);
  return cuda_host::shuffle("__shfl_up_sync", mask, value, within < delta ? lane : lane - delta, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, cuda_host::Site site = cuda_host::here()) {
  const unsigned lane = cuda_host::lane_index(), within = lane & unsigned(width - 1);
  const bool later_group = within + delta >= unsigned(width);
  return cuda_host::shuffle("__shfl_down_sync", mask, value, later_group ? lane : lane + delta, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, cuda_host::Site site = cuda_host::here()) {
  const unsigned lane = cuda_host::lane_index(), source = lane ^ unsigned(bits);
  const bool later_group = source >= (lane & ~unsigned(width - 1)) + unsigned(width);
  return cuda_host::shuffle("__shfl_xor_sync", mask, value, later_group ? lane : source, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_host::Site site = cuda_host::here()) {
  return cuda_host::vote("__ballot_sync", mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, cuda_host::Site site = cuda_host::here()) {
  return cuda_host::vote("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_host::Site site = cuda_host::here()) {
  return cuda_host::vote("__all_sync", mask, predicate, site) == mask;
}

#define CUDA_HOST_REDUCE(name, type, operation)                                                                    \
  inline type name(unsigned mask, type value, cuda_host::Site site = cuda_host::here()) {                          \
    return type(cuda_host::meet_warp(cuda_host::WarpOperation::operation, #name, mask, unsigned(value), 0, site)); \
  }
CUDA_HOST_REDUCE(__reduce_add_sync, unsigned, add)
CUDA_HOST_REDUCE(__reduce_min_sync, unsigned, min)
CUDA_HOST_REDUCE(__reduce_max_sync, unsigned, max)
CUDA_HOST_REDUCE(__reduce_add_sync, int, add)
CUDA_HOST_REDUCE(__reduce_min_sync, int, min_signed)
CUDA_HOST_REDUCE(__reduce_max_sync, int, max_signed)
CUDA_HOST_REDUCE(__reduce_and_sync, unsigned, bit_and)
CUDA_HOST_REDUCE(__reduce_or_sync, unsigned, bit_or)
CUDA_HOST_REDUCE(__reduce_xor_sync, unsigned, bit_xor)
#undef CUDA_HOST_REDUCE

[[noreturn]] inline void __trap(cuda_host::Site site = cuda_host::here()) { cuda_host::trap("__trap", site); }

// --- loads and stores with cache hints -------------------------------------------------------------------------------
#define CUDA_HOST_LOAD(name)            \
  template <class T>                    \
  __device__ T name(const T* address) { \
    return *address;                    \
  }
CUDA_HOST_LOAD(__ldg)
CUDA_HOST_LOAD(__ldca)
CUDA_HOST_LOAD(__ldcg)
CUDA_HOST_LOAD(__ldcs)
CUDA_HOST_LOAD(__ldlu)
CUDA_HOST_LOAD(__ldcv)
#undef CUDA_HOST_LOAD

#define CUDA_HOST_STORE(name)                                     \
  template <class T>                                              \
  __device__ void name(T* address, std::common_type_t<T> value) { \
    *address = value;                                             \
  }
CUDA_HOST_STORE(__stwb)
CUDA_HOST_STORE(__stcg)
CUDA_HOST_STORE(__stcs)
CUDA_HOST_STORE(__stwt)
#undef CUDA_HOST_STORE

// --- bits ------------------------------------------------------------------------------------------------------------
namespace cuda_host {

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

}  // namespace cuda_host

inline float __uint_as_float(unsigned bits) { return cuda_host::bits_as<float>(bits); }
inline float __int_as_float(int bits) { return cuda_host::bits_as<float>(bits); }
inline unsigned __float_as_uint(float value) { return cuda_host::bits_as<unsigned>(value); }
inline int __float_as_int(float value) { return cuda_host::bits_as<int>(value); }
inline double __longlong_as_double(long long bits) { return cuda_host::bits_as<double>(bits); }
inline long long __double_as_longlong(double value) { return cuda_host::bits_as<long long>(value); }
inline int __double2loint(double value) { return int(cuda_host::bits_as<uint64_t>(value)); }
inline int __double2hiint(double value) { return int(cuda_host::bits_as<uint64_t>(value) >> 32); }
inline double __hiloint2double(int high, int low) {
  return cuda_host::bits_as<double>(uint64_t(uint32_t(high)) << 32 | uint32_t(low));
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }

// --- arithmetic: correctly rounded where CUDA's approximate forms may be a few ulp off -------------------------------
inline float rounded_tanhf(float value) { return float(tanh(double(value))); }
#define tanhf rounded_tanhf  // glibc's errs by up to 2.0 ulp
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline double rsqrt(double value) { return 1.0 / sqrt(value); }
inline float rsqrt(float value) { return rsqrtf(value); }
inline float __frsqrt_rn(float value) { return rsqrtf(value); }
inline float __fsqrt_rn(float value) { return sqrtf(value); }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __expf(float value) { return expf(value); }
inline float __exp10f(float value) { return powf(10.0f, value); }
inline float __logf(float value) { return logf(value); }
inline float __log2f(float value) { return log2f(value); }

#define CUDA_HOST_EXTREMA(type)                                \
  constexpr type min(type x, type y) { return y < x ? y : x; } \
  constexpr type max(type x, type y) { return x < y ? y : x; }
CUDA_HOST_EXTREMA(int)
CUDA_HOST_EXTREMA(unsigned)
CUDA_HOST_EXTREMA(long)
CUDA_HOST_EXTREMA(unsigned long)
CUDA_HOST_EXTREMA(long long)
CUDA_HOST_EXTREMA(unsigned long long)
#undef CUDA_HOST_EXTREMA
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }
