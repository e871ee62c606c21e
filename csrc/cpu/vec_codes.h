// The rest of the SIMD vocabulary, for codes of 8 bits: bytes in and out, integers and floats, lookups. Rules as in
// vec.h.
#pragma once

#include "vec.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

BIGMODEL_INLINE F32 to_float(I32 v) { return __builtin_convertvector(v, F32); }
BIGMODEL_INLINE I32 to_int(F32 v) { return __builtin_convertvector(v, I32); }  // towards zero

// table[index % 8] of each lane.
BIGMODEL_INLINE F32 lookup(const float (&table)[8], I32 index) {
#if defined(__AVX512F__)
  __m512 twice = _mm512_broadcast_f32x8(_mm256_loadu_ps(table));
  return F32(_mm512_permutexvar_ps(bit_cast<__m512i>(index), twice));
#elif defined(__AVX2__)
  return F32(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), bit_cast<__m256i>(index)));
#else
  F32 found;
  for (int i = 0; i < kLanes<float>; ++i) found[i] = table[index[i] & 7];
  return found;
#endif
}

BIGMODEL_INLINE I32 load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return bit_cast<I32>(_mm512_cvtepu8_epi32(load_vector<__m128i>(p)));
#elif defined(__AVX2__)
  return bit_cast<I32>(_mm256_cvtepu8_epi32(_mm_set1_epi64x(load_vector<int64_t>(p))));
#elif defined(__x86_64__)
  return bit_cast<I32>(_mm_cvtepu8_epi32(_mm_set1_epi32(load_vector<int32_t>(p))));
#else
  return __builtin_convertvector((load_vector<VectorOf<uint8_t, kLanes<float> >::type>(p)), I32);
#endif
}

// Of lanes from 0 to 255.
BIGMODEL_INLINE void store_bytes(uint8_t* p, I32 v) {
#if defined(__AVX512F__)
  store_vector(p, _mm512_cvtepi32_epi8(bit_cast<__m512i>(v)));
#elif defined(__AVX2__)
  __m256i all = bit_cast<__m256i>(v);
  __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  store_vector(p, int64_t(_mm_cvtsi128_si64(_mm_packus_epi16(pairs, pairs))));
#elif defined(__x86_64__)
  __m128i pairs = _mm_packus_epi32(bit_cast<__m128i>(v), bit_cast<__m128i>(v));
  store_vector(p, int32_t(_mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs))));
#else
  store_vector(p, __builtin_convertvector(v, VectorOf<uint8_t, kLanes<float> >::type));
#endif
}

}  // namespace
}  // namespace bigmodel::cpu::BIGMODEL_ISA
