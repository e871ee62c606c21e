// The SIMD vocabulary of the CPU kernels: GCC/Clang vector extensions, one width per instruction set.
//
// Included only by csrc/cpu/*.isa.cpp, each compiled once per instruction set with BIGMODEL_ISA naming it. Everything
// here has internal linkage and nothing from the standard library is instantiated: a weak symbol in such an object
// could become the copy that processors without these instructions run (cmake/check_weak.cmake looks for them).
//
// A vector holds the compute type, float or double; load and store convert from and to the storage type.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../op.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

#define BIGMODEL_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T> constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T, int lanes> struct VectorOf { typedef T type __attribute__((vector_size(lanes * sizeof(T)))); };
template <class T> using Vec = typename VectorOf<T, kLanes<T>>::type;

// The type arithmetic is done in: float for the 16-bit types.
template <class S> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
template <class S> using Compute = typename ComputeOf<S>::type;

template <class To, class From>
BIGMODEL_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T> BIGMODEL_INLINE Vec<T> splat(T value) { return value - Vec<T>{}; }

using F32 = Vec<float>;
using I32 = VectorOf<int32_t, kLanes<float>>::type;
using U32 = VectorOf<uint32_t, kLanes<float>>::type;
using U16 = VectorOf<uint16_t, kLanes<float>>::type;

BIGMODEL_INLINE F32 from_bits(U16 bits, BFloat16) { return bit_cast<F32>(__builtin_convertvector(bits, U32) << 16); }

BIGMODEL_INLINE U16 to_bits(F32 value, BFloat16) {
  U32 bits = bit_cast<U32>(value);
  U32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  U32 is_nan = bit_cast<U32>((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((((bits | 0x400000u) & is_nan) | (rounded & ~is_nan)) >> 16, U16);
}

#if defined(__F16C__)

BIGMODEL_INLINE F32 from_bits(U16 bits, Float16) {
#if defined(__AVX512F__)
  return F32(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#else
  return F32(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#endif
}

BIGMODEL_INLINE U16 to_bits(F32 value, Float16) {
#if defined(__AVX512F__)
  return bit_cast<U16>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return bit_cast<U16>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#endif
}

#elif defined(__aarch64__)

using Half = VectorOf<__fp16, kLanes<float>>::type;
BIGMODEL_INLINE F32 from_bits(U16 bits, Float16) { return __builtin_convertvector(bit_cast<Half>(bits), F32); }
BIGMODEL_INLINE U16 to_bits(F32 value, Float16) { return bit_cast<U16>(__builtin_convertvector(value, Half)); }

#else

// Without F16C: shift the exponent and mantissa into place and let one exact multiplication by 2^112 rebias normals
// and subnormals alike; infinities and NaN get the float's all-ones exponent.
BIGMODEL_INLINE F32 from_bits(U16 half, Float16) {
  U32 bits = __builtin_convertvector(half, U32);
  U32 magnitude = (bits & 0x7fffu) << 13;
  U32 special = bit_cast<U32>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  F32 scaled = bit_cast<F32>(magnitude) * splat(0x1p112f);
  return bit_cast<F32>(bit_cast<U32>(scaled) | special | ((bits & 0x8000u) << 16));
}

BIGMODEL_INLINE U16 to_bits(F32 value, Float16) {
  U32 bits = bit_cast<U32>(value);
  U32 magnitude = bits & 0x7fffffffu;
  // Adding 0.5 aligns a subnormal half's last bit with the float's, so the addition itself rounds.
  U32 small = bit_cast<U32>(bit_cast<F32>(magnitude) + splat(0.5f)) - 0x3f000000u;
  U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U32 is_small = bit_cast<U32>(magnitude < 0x38800000u);
  U32 is_large = bit_cast<U32>(magnitude >= 0x47800000u);
  U32 is_nan = bit_cast<U32>(magnitude > 0x7f800000u);
  U32 finite = (small & is_small) | (normal & ~is_small);
  U32 large = 0x7c00u | (is_nan & 0x200u);
  return __builtin_convertvector((large & is_large) | (finite & ~is_large) | ((bits >> 16) & 0x8000u), U16);
}

#endif

BIGMODEL_INLINE F32 load(const float* p) { F32 v; memcpy(&v, p, sizeof(v)); return v; }
BIGMODEL_INLINE Vec<double> load(const double* p) { Vec<double> v; memcpy(&v, p, sizeof(v)); return v; }
template <class S> BIGMODEL_INLINE F32 load(const S* p) { U16 v; memcpy(&v, p, sizeof(v)); return from_bits(v, S{}); }

BIGMODEL_INLINE void store(float* p, F32 v) { memcpy(p, &v, sizeof(v)); }
BIGMODEL_INLINE void store(double* p, Vec<double> v) { memcpy(p, &v, sizeof(v)); }
template <class S> BIGMODEL_INLINE void store(S* p, F32 v) { U16 u = to_bits(v, S{}); memcpy(p, &u, sizeof(u)); }

// Sums the lanes as a balanced tree.
template <class T> BIGMODEL_INLINE T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  memcpy(lanes, &v, sizeof(v));
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// How a loop body reaches memory: a whole vector, or the n lanes that are left at the end of a row.
template <class T> struct Whole {
  template <class S> BIGMODEL_INLINE Vec<T> load(const S* p) const { return BIGMODEL_ISA::load(p); }
  template <class S> BIGMODEL_INLINE void store(S* p, Vec<T> v) const { BIGMODEL_ISA::store(p, v); }
  BIGMODEL_INLINE Vec<T> keep(Vec<T> v) const { return v; }
};

template <class T> struct Part {
  int n;
  template <class S> BIGMODEL_INLINE Vec<T> load(const S* p) const {
    S lanes[kLanes<T>] = {};
    memcpy(lanes, p, n * sizeof(S));
    return BIGMODEL_ISA::load(lanes);
  }
  template <class S> BIGMODEL_INLINE void store(S* p, Vec<T> v) const {
    S lanes[kLanes<T>];
    BIGMODEL_ISA::store(lanes, v);
    memcpy(p, lanes, n * sizeof(S));
  }
  // Zeroes the lanes beyond the end.
  BIGMODEL_INLINE Vec<T> keep(Vec<T> v) const {
    T lanes[kLanes<T>];
    memcpy(lanes, &v, sizeof(v));
    for (int i = n; i < kLanes<T>; ++i) lanes[i] = 0;
    memcpy(&v, lanes, sizeof(v));
    return v;
  }
};

// Calls body(offset, access, k) over n elements, four vectors at a time; k in 0..3 names the accumulator to add to, so
// that four independent sums hide the latency of an addition.
template <class T, class Body>
BIGMODEL_INLINE void sweep(int64_t n, Body body) {
  constexpr int step = kLanes<T>;
  int64_t i = 0;
  for (; i + 4 * step <= n; i += 4 * step) {
    body(i, Whole<T>{}, 0);
    body(i + step, Whole<T>{}, 1);
    body(i + 2 * step, Whole<T>{}, 2);
    body(i + 3 * step, Whole<T>{}, 3);
  }
  for (; i + step <= n; i += step) body(i, Whole<T>{}, 0);
  if (i < n) body(i, Part<T>{int(n - i)}, 0);
}

// Four vector accumulators and their sum.
template <class T> struct Accumulator {
  Vec<T> part[4] = {};
  BIGMODEL_INLINE T sum() const { return sum_lanes<T>((part[0] + part[1]) + (part[2] + part[3])); }
};

// No lane adds more than 64 terms in T: longer sums go on in double, so that a narrow vector rounds no worse than a wide
// one. body(begin, n) is called on pieces of at most this many elements.
template <class T> constexpr int64_t kPiece = 64 * 4 * kLanes<T>;

template <class T, class Body>
BIGMODEL_INLINE void pieces(int64_t n, Body body) {
  for (int64_t begin = 0; begin < n; begin += kPiece<T>) body(begin, n - begin < kPiece<T> ? n - begin : kPiece<T>);
}

}  // namespace
}  // namespace bigmodel::cpu::BIGMODEL_ISA
