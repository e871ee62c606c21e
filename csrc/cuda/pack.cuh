// Elements as they lie in memory: the four dtypes, packs of them moved in words of up to 16 bytes, and the same for a
// dtype known only at run time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../op.h"

namespace bigmodel::cuda {

constexpr int kPackBytes = 16;  // the widest load and store that a thread can issue

// Arithmetic is in float32, or float64 for float64.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(BFloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
__device__ inline float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <class T, class C>
__device__ T narrow(C value) {
  if constexpr (std::is_same_v<T, BFloat16>) return {__bfloat16_as_ushort(__float2bfloat16_rn(float(value)))};
  else if constexpr (std::is_same_v<T, Float16>) return {__half_as_ushort(__float2half_rn(float(value)))};
  else return T(value);
}

// E consecutive elements; in memory they start at a multiple of their size, or of 16 bytes where they are larger.
template <class T, int E>
struct Pack {
  static constexpr int kWords = E * int(sizeof(T)) / 4;
  uint32_t word[kWords];

  __device__ static bool aligned(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % (kWords < 4 ? kWords * 4 : kPackBytes) == 0;
  }

  __device__ static Pack load(const T* from) {
    Pack pack;
    if constexpr (kWords == 1) {
      pack.word[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (kWords == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      pack.word[0] = v.x, pack.word[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = reinterpret_cast<const uint4*>(from)[i / 4];
        pack.word[i] = v.x, pack.word[i + 1] = v.y, pack.word[i + 2] = v.z, pack.word[i + 3] = v.w;
      }
    }
    return pack;
  }

  __device__ void store(T* to) const {
    if constexpr (kWords == 1) {
      *reinterpret_cast<uint32_t*>(to) = word[0];
    } else if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        reinterpret_cast<uint4*>(to)[i / 4] = make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]);
    }
  }

  // The same, to global memory, in words that stay whole: nvcc takes an assignment of uint4 for four, and before sm_100
  // it merged those of softmax_forward_any with a branch that stores element by element, 4 bytes at a time. What this
  // forbids the compiler costs registers: with it the Adam update spills.
  __device__ void store_whole(T* to) const {
    if constexpr (kWords == 1) {
      *reinterpret_cast<uint32_t*>(to) = word[0];
    } else if constexpr (kWords == 2) {
      __stwb(reinterpret_cast<uint2*>(to), make_uint2(word[0], word[1]));
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        __stwb(reinterpret_cast<uint4*>(to) + i / 4, make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]));
    }
  }

  template <class C>
  __device__ void unpack(C (&value)[E]) const {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if constexpr (sizeof(T) == 2) value[e] = widen(T{uint16_t(word[e / 2] >> (16 * (e % 2)))});
      else if constexpr (sizeof(T) == 4) value[e] = __uint_as_float(word[e]);
      else value[e] = __hiloint2double(word[2 * e + 1], word[2 * e]);
    }
  }

  template <class C>
  __device__ static Pack of(const C (&value)[E]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(value[2 * i], value[2 * i + 1]);
        pack.word[i] = __bfloat16_as_ushort(pair.x) | uint32_t(__bfloat16_as_ushort(pair.y)) << 16;
      } else if constexpr (std::is_same_v<T, Float16>) {
        const __half2 pair = __floats2half2_rn(value[2 * i], value[2 * i + 1]);
        pack.word[i] = __half_as_ushort(pair.x) | uint32_t(__half_as_ushort(pair.y)) << 16;
      } else if constexpr (sizeof(T) == 4) {
        pack.word[i] = __float_as_uint(value[i]);
      } else {
        pack.word[i] = i % 2 ? __double2hiint(value[i / 2]) : __double2loint(value[i / 2]);
      }
    }
    return pack;
  }
};

// The first `count` of E elements at `base` + index, of a dtype known at run time and at any address; the rest are 0.
template <class T, class C, int E>
__device__ void load_part(C (&value)[E], const T* from, int count) {
  if constexpr (Pack<T, E>::kWords > 0) {
    if (count == E && Pack<T, E>::aligned(from)) return Pack<T, E>::load(from).unpack(value);
  }
#pragma unroll
  for (int e = 0; e < E; ++e) value[e] = e < count ? C(widen(from[e])) : C(0);
}

template <class C, int E>
__device__ void load_any(C (&value)[E], const void* base, DType dtype, int64_t index, int count) {
  switch (dtype) {
    case DType::float32: return load_part(value, static_cast<const float*>(base) + index, count);
    case DType::bfloat16: return load_part(value, static_cast<const BFloat16*>(base) + index, count);
    case DType::float16: return load_part(value, static_cast<const Float16*>(base) + index, count);
    case DType::float64: return load_part(value, static_cast<const double*>(base) + index, count);
  }
}

template <bool kWhole = false, class T, class C, int E>
__device__ void store_part(T* to, const C (&value)[E], int count) {
  if constexpr (Pack<T, E>::kWords > 0) {
    if (count == E && Pack<T, E>::aligned(to)) {
      if constexpr (kWhole) return Pack<T, E>::of(value).store_whole(to);
      else return Pack<T, E>::of(value).store(to);
    }
  }
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const T element = narrow<T>(value[e]);
    if (e < count) to[e] = element;
  }
}

template <bool kWhole = false, class C, int E>
__device__ void store_any(void* base, DType dtype, int64_t index, const C (&value)[E], int count) {
  switch (dtype) {
    case DType::float32: return store_part<kWhole>(static_cast<float*>(base) + index, value, count);
    case DType::bfloat16: return store_part<kWhole>(static_cast<BFloat16*>(base) + index, value, count);
    case DType::float16: return store_part<kWhole>(static_cast<Float16*>(base) + index, value, count);
    case DType::float64: return store_part<kWhole>(static_cast<double*>(base) + index, value, count);
  }
}

// The value as it will be read back from memory of that dtype.
template <class C>
__device__ C round_to(DType dtype, C value) {
  switch (dtype) {
    case DType::float32: return float(value);
    case DType::bfloat16: return widen(narrow<BFloat16>(value));
    case DType::float16: return widen(narrow<Float16>(value));
    default: return value;
  }
}

}  // namespace bigmodel::cuda
