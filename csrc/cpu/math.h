// exp and tanh over vectors, row tails without a copy, and the words of Philox. Included by *.isa.cpp only, like vec.h.
//
// Polynomials were fitted by Remez exchange for the relative error of the function, in 60 digits; the largest error
// before rounding stands beside each.
#pragma once

#include <cmath>

#include "vec.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

#define BIGMODEL_BODY(...) [&](__VA_ARGS__) __attribute__((always_inline))

using F64 = Vec<double>;
using I64 = VectorOf<int64_t, kLanes<double>>::type;
using U64 = VectorOf<uint64_t, kLanes<double>>::type;

template <class T> struct IntOf { using type = I32; };
template <> struct IntOf<double> { using type = I64; };
template <class T> using Int = typename IntOf<T>::type;

template <class T> constexpr T kInfinity = T(__builtin_inf());

// a > b ? a : b, so b where one is NaN: one instruction on x86-64, of which GCC 12 makes two.
#if defined(__AVX512F__)
BIGMODEL_INLINE F32 greater(F32 a, F32 b) { return _mm512_max_ps(a, b); }
BIGMODEL_INLINE F64 greater(F64 a, F64 b) { return _mm512_max_pd(a, b); }
#elif defined(__AVX2__)
BIGMODEL_INLINE F32 greater(F32 a, F32 b) { return _mm256_max_ps(a, b); }
BIGMODEL_INLINE F64 greater(F64 a, F64 b) { return _mm256_max_pd(a, b); }
#elif defined(__x86_64__)
BIGMODEL_INLINE F32 greater(F32 a, F32 b) { return _mm_max_ps(a, b); }
BIGMODEL_INLINE F64 greater(F64 a, F64 b) { return _mm_max_pd(a, b); }
#else
BIGMODEL_INLINE F32 greater(F32 a, F32 b) { return a > b ? a : b; }
BIGMODEL_INLINE F64 greater(F64 a, F64 b) { return a > b ? a : b; }
#endif
template <class T> BIGMODEL_INLINE Pack<T> greater(Pack<T> a, Pack<T> b) {
  return {greater(a.lo, b.lo), greater(a.hi, b.hi)};
}
// All lanes into one, as the balanced tree of sum_lanes, in registers: through memory, as there, it takes 40 cycles
// longer, which a row of 512 keys feels twice.
template <class T, int half = kLanes<T> / 2, class Join> BIGMODEL_INLINE T fold(Vec<T> v, Join join) {
  if constexpr (half == 0) {
    return v[0];
  } else {
    Int<T> lane{};
    for (int i = 0; i < kLanes<T>; ++i) lane[i] = i ^ half;
    return fold<T, half / 2>(join(v, __builtin_shuffle(v, lane)), join);
  }
}
template <class T> BIGMODEL_INLINE T greatest_lane(Vec<T> v) {
  return fold<T>(v, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return greater(a, b); });
}
template <class T> BIGMODEL_INLINE double total_of(const Accumulator<T>& sums) {
  Pack<T> both = sums.part[0] + sums.part[1];
  return fold<T>(both.lo + both.hi, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; });
}

// value * 2^n for n from -1100 to 1023, rounded once where the result is subnormal; 0 where `live` is false. There
// nothing is scaled: Intel's processors leave a result that underflows to microcode (docs/decisions.md).
#if defined(__AVX512F__)
BIGMODEL_INLINE __mmask16 not_below(F32 x, F32 least) { return _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ); }
BIGMODEL_INLINE __mmask8 not_below(F64 x, F64 least) { return _mm512_cmp_pd_mask(x, least, _CMP_NLT_UQ); }
BIGMODEL_INLINE F32 live_part(F32 x, __mmask16) { return x; }
BIGMODEL_INLINE F64 live_part(F64 x, __mmask8) { return x; }
BIGMODEL_INLINE F32 scale_by(F32 value, F32 n, I32, __mmask16 live) { return _mm512_maskz_scalef_ps(live, value, n); }
BIGMODEL_INLINE F64 scale_by(F64 value, F64 n, I64, __mmask8 live) { return _mm512_maskz_scalef_pd(live, value, n); }
#else
BIGMODEL_INLINE I32 not_below(F32 x, F32 least) { return ~(x < least); }
BIGMODEL_INLINE I64 not_below(F64 x, F64 least) { return ~(x < least); }
BIGMODEL_INLINE F32 live_part(F32 x, I32 live) { return bit_cast<F32>(bit_cast<I32>(x) & live); }
BIGMODEL_INLINE F64 live_part(F64 x, I64 live) { return bit_cast<F64>(bit_cast<I64>(x) & live); }
BIGMODEL_INLINE F32 scale_by(F32 value, F32, I32 n, I32 live) {
  I32 first = n >> 1, second = n - first;
  return live_part(value * bit_cast<F32>((first + 127) << 23) * bit_cast<F32>((second + 127) << 23), live);
}
BIGMODEL_INLINE F64 scale_by(F64 value, F64, I64 n, I64 live) {
  I64 first = n >> 1, second = n - first;
  return live_part(value * bit_cast<F64>((first + 1023) << 52) * bit_cast<F64>((second + 1023) << 52), live);
}
#endif

// Below -104 and -746 every result rounds to 0, and above no exponent overflows that the caller has: x <= 0 but for a
// rounding. NaN passes. Error: under 1 ulp (tests/ops/test_softmax.py).
BIGMODEL_INLINE F32 exp(F32 x) {
  constexpr float shift = 0x1.8p23f;  // adding it leaves the nearest integer in the last bits
  const auto live = not_below(x, -104.0f - F32{});
  x = live_part(x, live);
  F32 shifted = x * 0x1.715476p+0f + shift, n = shifted - shift;
  I32 whole = bit_cast<I32>(shifted) - bit_cast<int32_t>(shift);
  F32 r = x - n * 0x1.63p-1f;
  r = r - n * -2.1219444005469058277e-4f;
  F32 p = 0.0013814463902222006824f * r + 0.0083687803819531983802f;  // 3.1e-9
  p = p * r + 0.041668394262514532031f;
  p = p * r + 0.16666520108249141115f;
  p = p * r + 0.49999993412346602644f;
  return scale_by(p * (r * r) + r + 1.0f, n, whole, live);
}

BIGMODEL_INLINE F64 exp(F64 x) {
  constexpr double shift = 0x1.8p52;
  const auto live = not_below(x, -746.0 - F64{});
  x = live_part(x, live);
  F64 shifted = x * 0x1.71547652b82fep+0 + shift, n = shifted - shift;
  I64 whole = bit_cast<I64>(shifted) - bit_cast<int64_t>(shift);
  F64 r = x - n * 0x1.62e42feep-1;
  r = r - n * 1.9082149292705878161e-10;
  F64 p = 2.4999961934860011156e-8 * r + 2.7630378547659610609e-7;  // 3.7e-18
  p = p * r + 2.7557587351527633853e-6;
  p = p * r + 2.4801492763043502994e-5;
  p = p * r + 1.9841269504757020279e-4;
  p = p * r + 0.001388888894392235477;
  p = p * r + 0.0083333333334956263881;
  p = p * r + 0.041666666666529189844;
  p = p * r + 0.16666666666666410233;
  p = p * r + 0.50000000000000107208;
  return scale_by(p * (r * r) + r + 1.0, n, whole, live);
}

// Where |x| is small, 1 - 2 / (exp(2 |x|) + 1) would be a difference of equals: there an odd polynomial.
BIGMODEL_INLINE F32 tanh(F32 x) {
  F32 size = x < 0.0f ? -x : x, u = x * x;
  F32 p = -0.0057049878052279844221f * u + 0.020639087976318889672f;  // 4.4e-9
  p = p * u + -0.053739715309801812399f;
  p = p * u + 0.13331442200864337363f;
  p = p * u + -0.33333281942114325476f;
  F32 near = p * u * size + size;
  F32 e = exp(-2.0f * size);  // from -2 |x|, which cannot overflow
  F32 far = (1.0f - e) / (1.0f + e);
  F32 y = size < 0.625f ? near : far;
  return x < 0.0f ? -y : y;
}

BIGMODEL_INLINE F64 tanh(F64 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}

template <class T> BIGMODEL_INLINE Pack<T> exp(Pack<T> x) { return {exp(x.lo), exp(x.hi)}; }
template <class T> BIGMODEL_INLINE Pack<T> tanh(Pack<T> x) { return {tanh(x.lo), tanh(x.hi)}; }

// The lanes' own numbers: 0, 1, 2, ...
template <class T> BIGMODEL_INLINE Pack<T> lane_numbers() {
  alignas(64) static constexpr T numbers[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  return load_whole(numbers);
}

// The end of a row of at least one step: the step that ends there, of which the first `done` elements were done before.
template <class T> struct Again : Whole<T> {
  int done;
  // Zeroes what was done before.
  BIGMODEL_INLINE Pack<T> keep(Pack<T> v) const {
    constexpr Vec<T> zero{};
    Pack<T> at = lane_numbers<T>();
    const T first = T(done);
    return {at.lo >= first ? v.lo : zero, at.hi >= first ? v.hi : zero};
  }
};

// What is beyond the end of a row never is its largest element.
template <class T> BIGMODEL_INLINE Pack<T> keep_least(Whole<T>, Pack<T> v) { return v; }
template <class T> BIGMODEL_INLINE Pack<T> keep_least(Again<T>, Pack<T> v) { return v; }
template <class T> BIGMODEL_INLINE Pack<T> keep_least(Part<T> part, Pack<T> v) {
  T elements[kStep<T>];
  put<false>(elements, v);
  for (int i = part.n; i < kStep<T>; ++i) elements[i] = -kInfinity<T>;
  return load(elements);
}

// sweep for bodies that may see an element twice, since they only store what does not depend on it and add through
// `keep`: the tail is a whole step then, where a Part goes through memory.
template <class T, class Body>
BIGMODEL_INLINE void resweep(int64_t n, Body body) {
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
  if (i == n) return;
  if (n >= step) body(n - step, Again<T>{{}, int(step - (n - i))}, 0);
  else body(i, Part<T>{int(n - i)}, 0);
}

// 32 x 32 = 64 bits, of words in the lower halves of 64-bit lanes.
BIGMODEL_INLINE U64 multiply_words(U64 words, uint32_t by) {
#if defined(__AVX512F__)
  return U64(_mm512_mul_epu32(__m512i(words), _mm512_set1_epi64(by)));
#elif defined(__AVX2__)
  return U64(_mm256_mul_epu32(__m256i(words), _mm256_set1_epi64x(by)));
#elif defined(__x86_64__)
  return U64(_mm_mul_epu32(__m128i(words), _mm_set1_epi64x(by)));
#else
  return (words & 0xffffffffu) * uint64_t(by);
#endif
}

// The words of Philox4x32-10 at the counters block, block + 1, ..., one counter for each 64-bit lane, in their order.
struct Words { U32 first, second; };
BIGMODEL_INLINE Words philox(uint64_t seed, uint64_t block) {
  constexpr int lanes = kLanes<double>;
  constexpr uint64_t low = 0xffffffffu;
  U64 number{};
  for (int i = 0; i < lanes; ++i) number[i] = uint64_t(i);
  U64 counter = number + block, c0 = counter & low, c1 = counter >> 32, c2{}, c3{};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    U64 product0 = multiply_words(c0, 0xD2511F53u), product1 = multiply_words(c2, 0xCD9E8D57u);
    c0 = (product1 >> 32) ^ c1 ^ uint64_t(k0);
    c1 = product1 & low;
    c2 = (product0 >> 32) ^ c3 ^ uint64_t(k1);
    c3 = product0 & low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  U64 even = c0 | c1 << 32, odd = c2 | c3 << 32, lower = number / 2 + (number & 1) * lanes;
  return {bit_cast<U32>(__builtin_shuffle(even, odd, lower)),
          bit_cast<U32>(__builtin_shuffle(even, odd, lower + lanes / 2))};
}

}  // namespace
}  // namespace bigmodel::cpu::BIGMODEL_ISA
