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
#if defined(__x86_64__)
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

using F32 = Vec<float>;
using I32 = VectorOf<int32_t, kLanes<float>>::type;
using U32 = VectorOf<uint32_t, kLanes<float>>::type;
using U16 = VectorOf<uint16_t, kLanes<float>>::type;

// Between 16 and 32 bits. __builtin_convertvector says the same, and GCC 12 makes of it five times the instructions.
#if defined(__AVX512F__)
BIGMODEL_INLINE U32 widen(U16 v) { return bit_cast<U32>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(v))); }
BIGMODEL_INLINE U16 narrow(U32 v) { return bit_cast<U16>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(v))); }
#elif defined(__AVX2__)
BIGMODEL_INLINE U32 widen(U16 v) { return bit_cast<U32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v))); }
BIGMODEL_INLINE U16 narrow(U32 v) {
  __m256i all = bit_cast<__m256i>(v);
  return bit_cast<U16>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
#elif defined(__x86_64__)
BIGMODEL_INLINE U32 widen(U16 v) { return bit_cast<U32>(_mm_cvtepu16_epi32(_mm_set1_epi64x(bit_cast<int64_t>(v)))); }
BIGMODEL_INLINE U16 narrow(U32 v) {
  __m128i all = bit_cast<__m128i>(v);
  return bit_cast<U16>(_mm_cvtsi128_si64(_mm_packus_epi32(all, all)));
}
#else
BIGMODEL_INLINE U32 widen(U16 v) { return __builtin_convertvector(v, U32); }
BIGMODEL_INLINE U16 narrow(U32 v) { return __builtin_convertvector(v, U16); }
#endif

BIGMODEL_INLINE F32 from_bits(U16 bits, BFloat16) { return bit_cast<F32>(widen(bits) << 16); }

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
  U32 bits = widen(half);
  U32 magnitude = (bits & 0x7fffu) << 13;
  U32 special = bit_cast<U32>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  F32 scaled = bit_cast<F32>(magnitude) * 0x1p112f;
  return bit_cast<F32>(bit_cast<U32>(scaled) | special | ((bits & 0x8000u) << 16));
}

BIGMODEL_INLINE U16 to_bits(F32 value, Float16) {
  U32 bits = bit_cast<U32>(value);
  U32 magnitude = bits & 0x7fffffffu;
  // Adding 0.5 aligns a subnormal half's last bit with the float's, so the addition itself rounds.
  U32 small = bit_cast<U32>(bit_cast<F32>(magnitude) + 0.5f) - 0x3f000000u;
  U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U32 is_small = bit_cast<U32>(magnitude < 0x38800000u);
  U32 is_large = bit_cast<U32>(magnitude >= 0x47800000u);
  U32 is_nan = bit_cast<U32>(magnitude > 0x7f800000u);
  U32 finite = (small & is_small) | (normal & ~is_small);
  U32 large = 0x7c00u | (is_nan & 0x200u);
  return narrow((large & is_large) | (finite & ~is_large) | ((bits >> 16) & 0x8000u));
}

#endif

// What loops compute with: two vectors, so that two stores of 16-bit results can be one.
template <class T> struct Pack { Vec<T> lo, hi; };
template <class T> constexpr int kStep = 2 * kLanes<T>;

#define BIGMODEL_OPERATOR(op)                                                    \
  template <class T> BIGMODEL_INLINE Pack<T> operator op(Pack<T> a, Pack<T> b) { \
    return {a.lo op b.lo, a.hi op b.hi};                                         \
  }                                                                              \
  template <class T> BIGMODEL_INLINE void operator op## = (Pack<T> & a, Pack<T> b) { a = a op b; }
BIGMODEL_OPERATOR(+)
BIGMODEL_OPERATOR(-)
BIGMODEL_OPERATOR(*)
BIGMODEL_OPERATOR(/)
#undef BIGMODEL_OPERATOR

template <class T> BIGMODEL_INLINE Pack<T> splat(T value) { return {value - Vec<T>{}, value - Vec<T>{}}; }

// a / b, and 0 where b is 0.
template <class T> BIGMODEL_INLINE Pack<T> divide_or_zero(Pack<T> a, Pack<T> b) {
  constexpr Vec<T> zero{};
  return {b.lo == zero ? zero : a.lo / b.lo, b.hi == zero ? zero : a.hi / b.hi};
}

// The larger; NaN where either is.
template <class T> BIGMODEL_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) { return (a < b) | (b != b) ? b : a; }
template <class T> BIGMODEL_INLINE Pack<T> maximum(Pack<T> a, Pack<T> b) {
  return {maximum<T>(a.lo, b.lo), maximum<T>(a.hi, b.hi)};
}

template <class T> BIGMODEL_INLINE Vec<T> square_root(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return Vec<T>(_mm512_sqrt_ps(bit_cast<__m512>(v)));
  else return Vec<T>(_mm512_sqrt_pd(bit_cast<__m512d>(v)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return Vec<T>(_mm256_sqrt_ps(bit_cast<__m256>(v)));
  else return Vec<T>(_mm256_sqrt_pd(bit_cast<__m256d>(v)));
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 4) return Vec<T>(_mm_sqrt_ps(bit_cast<__m128>(v)));
  else return Vec<T>(_mm_sqrt_pd(bit_cast<__m128d>(v)));
#else
  for (int i = 0; i < kLanes<T>; ++i) v[i] = sizeof(T) == 4 ? __builtin_sqrtf(v[i]) : __builtin_sqrt(v[i]);
  return v;
#endif
}
template <class T> BIGMODEL_INLINE Pack<T> square_root(Pack<T> v) {
  return {square_root<T>(v.lo), square_root<T>(v.hi)};
}

// Vector by vector: a memcpy of the whole struct goes through the stack.
template <class V, class S> BIGMODEL_INLINE V load_vector(const S* p) {
  V v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <class V, class S> BIGMODEL_INLINE void store_vector(S* p, V v) { memcpy(p, &v, sizeof(v)); }

// Stores past the caches to an address aligned to the vector's size; the writer calls store_fence (parallel.h) at last.
template <class V, class S> BIGMODEL_INLINE void stream_vector(S* p, V v) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 8) _mm_stream_si64(reinterpret_cast<long long*>(p), bit_cast<long long>(v));
  if constexpr (sizeof(V) == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(v));
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(v));
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(v));
#endif
#else
  store_vector(p, v);
#endif
}

template <bool streaming, class V, class S> BIGMODEL_INLINE void put_vector(S* p, V v) {
  if constexpr (streaming) stream_vector(p, v);
  else store_vector(p, v);
}

template <class T> BIGMODEL_INLINE Pack<T> load_whole(const T* p) {
  return {load_vector<Vec<T>>(p), load_vector<Vec<T>>(p + kLanes<T>)};
}
template <bool streaming, class T> BIGMODEL_INLINE void put(T* p, Pack<T> v) {
  put_vector<streaming>(p, v.lo);
  put_vector<streaming>(p + kLanes<T>, v.hi);
}

BIGMODEL_INLINE Pack<float> load(const float* p) { return load_whole(p); }
BIGMODEL_INLINE Pack<double> load(const double* p) { return load_whole(p); }
template <class S> BIGMODEL_INLINE Pack<float> load(const S* p) {
  return {from_bits(load_vector<U16>(p), S{}), from_bits(load_vector<U16>(p + kLanes<float>), S{})};
}

template <bool streaming> BIGMODEL_INLINE void put(Float16* p, Pack<float> v) {
  put_vector<streaming>(p, to_bits(v.lo, Float16{}));
  put_vector<streaming>(p + kLanes<float>, to_bits(v.hi, Float16{}));
}

// The upper halves of all lanes, and whether any lane of two vectors is NaN.
#if defined(__AVX512F__)
template <bool streaming> BIGMODEL_INLINE void put_upper(BFloat16* p, U32 lo, U32 hi) {
  alignas(64) static constexpr uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                   33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  put_vector<streaming>(
      p, _mm512_permutex2var_epi16(bit_cast<__m512i>(lo), _mm512_load_si512(odd), bit_cast<__m512i>(hi)));
}
BIGMODEL_INLINE bool any_nan(Pack<float> v) { return _mm512_cmp_ps_mask(v.lo, v.hi, _CMP_UNORD_Q); }
#elif defined(__AVX2__)
template <bool streaming> BIGMODEL_INLINE void put_upper(BFloat16* p, U32 lo, U32 hi) {
  __m256i pairs = _mm256_packus_epi32(bit_cast<__m256i>(lo >> 16), bit_cast<__m256i>(hi >> 16));
  put_vector<streaming>(p, _mm256_permute4x64_epi64(pairs, 0xd8));
}
BIGMODEL_INLINE bool any_nan(Pack<float> v) { return _mm256_movemask_ps(_mm256_cmp_ps(v.lo, v.hi, _CMP_UNORD_Q)); }
#elif defined(__x86_64__)
template <bool streaming> BIGMODEL_INLINE void put_upper(BFloat16* p, U32 lo, U32 hi) {
  put_vector<streaming>(p, _mm_packus_epi32(bit_cast<__m128i>(lo >> 16), bit_cast<__m128i>(hi >> 16)));
}
BIGMODEL_INLINE bool any_nan(Pack<float> v) { return _mm_movemask_ps(_mm_cmpunord_ps(v.lo, v.hi)); }
#else
template <bool streaming> BIGMODEL_INLINE void put_upper(BFloat16* p, U32 lo, U32 hi) {
  put_vector<streaming>(p, narrow(lo >> 16));
  put_vector<streaming>(p + kLanes<float>, narrow(hi >> 16));
}
BIGMODEL_INLINE bool any_nan(Pack<float> v) {
  I32 unordered = (v.lo != v.lo) | (v.hi != v.hi);
  int32_t any = 0;
  for (int i = 0; i < kLanes<float>; ++i) any |= unordered[i];
  return any;
}
#endif

// To nearest even. The carry of rounding would turn some NaN into infinities or zeros: those lanes are truncated,
// quiet.
template <bool streaming> BIGMODEL_INLINE void put(BFloat16* p, Pack<float> v) {
  U32 lo = bit_cast<U32>(v.lo), hi = bit_cast<U32>(v.hi);
  U32 rounded_lo = lo + (((lo >> 16) & 1u) + 0x7fffu), rounded_hi = hi + (((hi >> 16) & 1u) + 0x7fffu);
  if (__builtin_expect(any_nan(v), 0)) {
    rounded_lo = v.lo == v.lo ? rounded_lo : lo | 0x400000u;
    rounded_hi = v.hi == v.hi ? rounded_hi : hi | 0x400000u;
  }
  put_upper<streaming>(p, rounded_lo, rounded_hi);
}

// Sums the lanes as a balanced tree.
template <class T> BIGMODEL_INLINE T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  memcpy(lanes, &v, sizeof(v));
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// How a loop body reaches memory: a whole step, or the n elements that are left at the end of a row.
template <class T> struct Whole {
  template <class S> BIGMODEL_INLINE Pack<T> load(const S* p) const { return BIGMODEL_ISA::load(p); }
  template <class S> BIGMODEL_INLINE void store(S* p, Pack<T> v) const { put<false>(p, v); }
  template <bool streaming, class S> BIGMODEL_INLINE void put_at(S* p, Pack<T> v) const { put<streaming>(p, v); }
  BIGMODEL_INLINE Pack<T> keep(Pack<T> v) const { return v; }
};

template <class T> struct Part {
  int n;
  template <class S> BIGMODEL_INLINE Pack<T> load(const S* p) const {
    S elements[kStep<T>] = {};
    memcpy(elements, p, n * sizeof(S));
    return BIGMODEL_ISA::load(elements);
  }
  template <class S> BIGMODEL_INLINE void store(S* p, Pack<T> v) const {
    S elements[kStep<T>];
    put<false>(elements, v);
    memcpy(p, elements, n * sizeof(S));
  }
  template <bool streaming, class S> BIGMODEL_INLINE void put_at(S* p, Pack<T> v) const { store(p, v); }
  // Zeroes what is beyond the end.
  BIGMODEL_INLINE Pack<T> keep(Pack<T> v) const {
    T elements[kStep<T>];
    put<false>(elements, v);
    for (int i = n; i < kStep<T>; ++i) elements[i] = 0;
    return BIGMODEL_ISA::load(elements);
  }
};

// Asks for the memory of a later step, in the next row or further on in this one: memory is idle while arithmetic runs.
// `level` is the cache that it comes to.
template <class T, int level = 2, class S> BIGMODEL_INLINE void fetch(const S* p) {
  for (int byte = 0; byte < int(kStep<T> * sizeof(S)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 4 - level);
}

// Calls body(offset, access, k) over n elements, two steps at a time; k, 0 or 1, names the accumulator to add to, so
// that four independent vector sums hide the latency of an addition.
template <class T, class Body>
BIGMODEL_INLINE void sweep(int64_t n, Body body) {
  constexpr int step = kStep<T>;
  int64_t i = 0;
  for (; i + 2 * step <= n; i += 2 * step) {
    body(i, Whole<T>{}, 0);
    body(i + step, Whole<T>{}, 1);
  }
  if (i + step <= n) {
    body(i, Whole<T>{}, 0);
    i += step;
  }
  if (i < n) body(i, Part<T>{int(n - i)}, 0);
}

template <class T> struct Accumulator {
  Pack<T> part[2] = {};
  BIGMODEL_INLINE T sum() const {
    Pack<T> both = part[0] + part[1];
    return sum_lanes<T>(both.lo + both.hi);
  }
};

// No lane adds more than 64 terms in T: longer sums go on in double, so that a narrow vector rounds no worse than a
// wide one. body(begin, n) is called on pieces of at most this many elements.
template <class T> constexpr int64_t kPiece = 64 * 2 * kStep<T>;

template <class T, class Body>
BIGMODEL_INLINE void pieces(int64_t n, Body body) {
  for (int64_t begin = 0; begin < n; begin += kPiece<T>) body(begin, n - begin < kPiece<T> ? n - begin : kPiece<T>);
}

}  // namespace
}  // namespace bigmodel::cpu::BIGMODEL_ISA
