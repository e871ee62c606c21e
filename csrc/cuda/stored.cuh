// Elements of the multi-tensor ops as they are stored, in a format known at run time: float32, 16 bits, float64, 8-bit
// codes with a scale for each block. Loads give raw words first, which are looked at later.
#pragma once

#include "../dynamic_code.h"
#include "../table.h"
#include "common.cuh"
#include "pack.cuh"

namespace bigmodel::cuda {

__constant__ const DynamicCode kDynamicCodes[2] = {dynamic_code(false), dynamic_code(true)};

// A pack as it lies in memory, not yet looked at, so that the loads of all streams are under way before the first is
// waited for.
struct Raw { uint32_t word[4]; };

template <class C>
constexpr int kPackElements = kPackBytes / int(sizeof(C));

template <class T, class C>
__device__ void load_elements(Raw& raw, const T* from, int count) {
  constexpr int E = kPackElements<C>;
  C value[E];
  load_part(value, from, count);
#pragma unroll
  for (int i = 0; i < 4; ++i) raw.word[i] = Pack<C, E>::of(value).word[i];
}

__device__ inline Raw load_raw(Tag<float>, const void* from, int format, int count) {
  Raw raw{};
  const bool whole = count == 4 && reinterpret_cast<uintptr_t>(from) % (4 * bytes_of(format)) == 0;
  if (format == int(DType::float32)) {
    const auto* words = static_cast<const uint32_t*>(from);
    if (whole) {
      const uint4 v = *static_cast<const uint4*>(from);
      raw = {{v.x, v.y, v.z, v.w}};
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (e < count) raw.word[e] = words[e];
    }
  } else if (format == kQuantised) {
    const auto* bytes = static_cast<const uint8_t*>(from);
    if (whole) raw.word[0] = *static_cast<const uint32_t*>(from);
    else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (e < count) raw.word[0] |= uint32_t(bytes[e]) << (8 * e);
    }
  } else if (format == int(DType::float64)) {
    load_elements<double, float>(raw, static_cast<const double*>(from), count);
  } else {
    const auto* halves = static_cast<const uint16_t*>(from);
    if (whole) {
      const uint2 v = *static_cast<const uint2*>(from);
      raw.word[0] = v.x, raw.word[1] = v.y;
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (e < count) raw.word[e / 2] |= uint32_t(halves[e]) << (16 * (e % 2));
    }
  }
  return raw;
}

// float64 rows: everything is widened at once.
__device__ inline Raw load_raw(Tag<double>, const void* from, int format, int count) {
  double value[2];
  Raw raw;
  load_any(value, from, DType(format), 0, count);
  const auto pack = Pack<double, 2>::of(value);
#pragma unroll
  for (int i = 0; i < 4; ++i) raw.word[i] = pack.word[i];
  return raw;
}

// Two packs of a 16-bit type that lie side by side, at a multiple of 16 bytes.
__device__ inline void load_pair(Raw (&raw)[2], const uint16_t* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  raw[0].word[0] = v.x, raw[0].word[1] = v.y, raw[1].word[0] = v.z, raw[1].word[1] = v.w;
}

__device__ inline void store_pair(uint16_t* to, DType dtype, const float (&value)[2][4]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    word[i] = dtype == DType::bfloat16 ? Pack<BFloat16, 4>::of(value[i / 2]).word[i % 2]
                                       : Pack<Float16, 4>::of(value[i / 2]).word[i % 2];
  *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
}

// As integers, so that NaN is larger than infinity.
__device__ inline uint32_t magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

__device__ inline float decode(const DynamicCode& code, int byte, float scale) {
  const int distance = byte - code.zero;
  const float u = float(distance < 0 ? -distance : distance + code.first);
  const int entry = (int(__float_as_uint(u) >> 23) - 127 - code.first) & 7;
  const float value = distance == 0 ? 0.0f : fmaf(code.slope[entry], u, code.offset[entry]);
  return (distance < 0 ? -value : value) * scale;
}

// The code nearest to `value`, a quotient of magnitude 1 or less (or NaN: some code); unsigned, 0 for 0 alone.
__device__ inline uint32_t encode(const DynamicCode& code, float value) {
  const float magnitude = code.zero ? fabsf(value) : value;
  int entry = -1;
#pragma unroll
  for (int i = 0; i < 8; ++i) entry += magnitude > code.border[i];
  int u = code.first + (!code.zero && magnitude > 0);
  if (entry >= 0) u = int(fminf(fmaf(code.inverse[entry], magnitude, code.shift[entry]), code.last[entry]));
  return uint32_t(code.zero + (code.zero && value < 0 ? -min(u, 127) : u - code.first));
}

// Cuts a float to a 16-bit type's precision after adding random bits below it. Infinities and NaN stay.
__device__ inline float cut(float value, uint32_t random, DType dtype) {
  const uint32_t bits = __float_as_uint(value), sign = bits & 0x80000000u;
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  if (dtype == DType::bfloat16) return __uint_as_float((bits + (random >> 16)) & 0xffff0000u);
  const float magnitude = fabsf(value);
  if (magnitude >= 0x1p-14f) return __uint_as_float((bits + (random >> 19)) & 0xffffe000u);
  const int steps = int(magnitude * 0x1p24f + float(random >> 8) * 0x1p-24f);
  return __uint_as_float(__float_as_uint(float(steps) * 0x1p-24f) | sign);
}

// Into values of the compute type, but for 8-bit codes.
template <class C, int E>
__device__ void widen_raw(C (&value)[E], const Raw& raw, int format) {
  if constexpr (std::is_same_v<C, double>) {
#pragma unroll
    for (int e = 0; e < E; ++e) value[e] = __hiloint2double(int(raw.word[2 * e + 1]), int(raw.word[2 * e]));
  } else {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const auto bits = uint16_t(raw.word[e / 2] >> (16 * (e % 2)));
      if (format == int(DType::bfloat16)) value[e] = widen(BFloat16{bits});
      else if (format == int(DType::float16)) value[e] = widen(Float16{bits});
      else value[e] = __uint_as_float(raw.word[e]);
    }
  }
}

template <class C, int E>
__device__ void load_codes(C (&value)[E], const Raw& raw, const DynamicCode& code, float scale) {
#pragma unroll
  for (int e = 0; e < E; ++e) value[e] = decode(code, int(raw.word[0] >> (8 * e) & 255), scale);
}

// The codes of a block that lies in one warp, and its scale. Every lane of the warp must call it.
template <int U, int E, class At, class Count>
__device__ void store_codes(uint8_t* base, float* scale, const float (&value)[U][E], const DynamicCode& code, At at,
                            Count count) {
  uint32_t most = 0;
#pragma unroll
  for (int u = 0; u < U; ++u)
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (e < count(u)) most = max(most, magnitude_bits(value[u][e]));
  for (int offset = kWarp / 2; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(~0u, most, offset));
  const float largest = __uint_as_float(most);
  const float unit = most >= 0x00800000u ? 1 / largest : 0.0f;  // of a subnormal it would be infinite
  __syncwarp();                                                 // every lane has read the old scale
  if (threadIdx.x % kWarp == 0) *scale = largest;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    uint8_t* const to = base + at(u);
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < E; ++e) word |= encode(code, value[u][e] * unit) << (8 * e);
    if (count(u) == E && reinterpret_cast<uintptr_t>(to) % E == 0) {
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
#pragma unroll
      for (int e = 0; e < E; ++e)
        if (e < count(u)) to[e] = uint8_t(word >> (8 * e));
    }
  }
}

}  // namespace bigmodel::cuda
