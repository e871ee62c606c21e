// 8-bit codes (dynamic_code.h) and stochastic rounding over one chunk, for one instruction set.
#include "quantise.h"

#include "../dynamic_code.h"
#include "../random.h"
#include "vec_codes.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

constexpr DynamicCode kSigned = dynamic_code(true), kUnsigned = dynamic_code(false);

// One vector of values of codes, each times `scale`.
template <bool is_signed>
BIGMODEL_INLINE F32 decode(I32 code, F32 scale) {
  constexpr const DynamicCode& lines = is_signed ? kSigned : kUnsigned;
  I32 distance = is_signed ? code - 127 : code + 1;
  I32 u = is_signed ? (distance < 0 ? -distance : distance) : distance;
  F32 real = to_float(u);
  I32 decade = (bit_cast<I32>(real) >> 23) - (is_signed ? 127 : 128);
  F32 value = lookup(lines.slope, decade) * real + lookup(lines.offset, decade);
  if constexpr (is_signed) {
    value = bit_cast<F32>(bit_cast<I32>(value) | (distance & INT32_MIN));
  }
  return (code == (is_signed ? 127 : 0) ? F32{} : value) * scale;
}

// The codes nearest to `value`, a quotient of magnitude 1 or less (or NaN: some code); unsigned, 0 for 0 alone.
template <bool is_signed>
BIGMODEL_INLINE I32 encode(F32 value) {
  constexpr const DynamicCode& lines = is_signed ? kSigned : kUnsigned;
  U32 sign = bit_cast<U32>(value) & 0x80000000u;
  F32 magnitude = is_signed ? bit_cast<F32>(bit_cast<U32>(value) ^ sign) : value;
  I32 decade = I32{} - 1;
  for (float border : lines.border) decade -= magnitude > border;
  I32 index = decade & 7;
  F32 u = lookup(lines.inverse, index) * magnitude + lookup(lines.shift, index), last = lookup(lines.last, index);
  I32 distance = to_int(u < last ? u : last);
  I32 lowest = is_signed ? I32{} : 1 - (magnitude > F32{});  // a comparison gives -1
  distance = decade < 0 ? lowest : distance;
  if constexpr (is_signed) return 127 + (sign != 0u ? -(distance < 128 ? distance : I32{} + 127) : distance);
  else return distance - 1;
}

template <bool is_signed>
void load_codes_of(float* values, const uint8_t* codes, const float* scales, int64_t n) {
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < n; ++scales) {
    const int64_t end = n - i < kQuantBlock ? n : i + kQuantBlock;
    const F32 scale = splat(*scales).lo;
    for (; i + lanes <= end; i += lanes) store_vector(values + i, decode<is_signed>(load_bytes(codes + i), scale));
    if (i < end) {
      uint8_t tail[lanes] = {};
      memcpy(tail, codes + i, end - i);
      F32 decoded = decode<is_signed>(load_bytes(tail), scale);
      memcpy(values + i, &decoded, (end - i) * sizeof(float));
      i = end;
    }
  }
}

// As integers, so that NaN is larger than infinity and ends up as the scale.
BIGMODEL_INLINE I32 magnitude_bits(F32 value) { return bit_cast<I32>(value) & 0x7fffffff; }
BIGMODEL_INLINE I32 larger(I32 a, I32 b) { return a > b ? a : b; }

template <bool is_signed>
void store_codes_of(uint8_t* codes, float* scales, const float* values, int64_t n) {
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < n; ++scales) {
    const int64_t end = n - i < kQuantBlock ? n : i + kQuantBlock, whole = i + (end - i) / lanes * lanes;
    F32 tail{};
    if (whole < end) memcpy(&tail, values + whole, (end - whole) * sizeof(float));
    I32 most = magnitude_bits(tail);
    for (int64_t j = i; j < whole; j += lanes) most = larger(most, magnitude_bits(load_vector<F32>(values + j)));
    int32_t largest = 0;
    for (int lane = 0; lane < lanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
    *scales = bit_cast<float>(largest);
    const F32 unit = splat(largest >= 0x00800000 ? 1 / *scales : 0.0f).lo;  // of a subnormal it would be infinite
    for (; i < whole; i += lanes) store_bytes(codes + i, encode<is_signed>(load_vector<F32>(values + i) * unit));
    if (whole < end) {
      uint8_t last[lanes];
      store_bytes(last, encode<is_signed>(tail * unit));
      memcpy(codes + whole, last, end - whole);
      i = end;
    }
  }
}

void load_codes(float* values, const uint8_t* codes, const float* scales, int64_t n, bool is_signed) {
  is_signed ? load_codes_of<true>(values, codes, scales, n) : load_codes_of<false>(values, codes, scales, n);
}

void store_codes(uint8_t* codes, float* scales, const float* values, int64_t n, bool is_signed) {
  is_signed ? store_codes_of<true>(codes, scales, values, n) : store_codes_of<false>(codes, scales, values, n);
}

// --- stochastic rounding
// ----------------------------------------------------------------------------------------------

// Adding random bits below the last one that stays, then cutting them off. Infinities and NaN are as they were.
BIGMODEL_INLINE F32 cut(F32 value, U32 random, BFloat16) {
  U32 bits = bit_cast<U32>(value);
  U32 cut_off = (bits + (random >> 16)) & 0xffff0000u;
  return bit_cast<F32>((bits & 0x7f800000u) == 0x7f800000u ? bits : cut_off);
}

// Below 2^-14 a half is a multiple of 2^-24: there the integer part of value * 2^24 + random takes the place of bits.
BIGMODEL_INLINE F32 cut(F32 value, U32 random, Float16) {
  U32 bits = bit_cast<U32>(value), sign = bits & 0x80000000u;
  U32 normal = (bits + (random >> 19)) & 0xffffe000u;
  F32 magnitude = bit_cast<F32>(bits ^ sign);
  I32 steps = to_int(magnitude * 0x1p24f + to_float(bit_cast<I32>(random >> 8)) * 0x1p-24f);
  U32 small = bit_cast<U32>(to_float(steps) * 0x1p-24f) | sign;
  U32 rounded = magnitude < 0x1p-14f ? small : normal;
  return bit_cast<F32>((bits & 0x7f800000u) == 0x7f800000u ? bits : rounded);
}

template <class S>
void round_stochastically(void* to_, const float* from, int64_t n, uint64_t key, int64_t begin) {
  constexpr int lanes = kLanes<float>;
  auto* to = static_cast<S*>(to_);
  U32 lane;
  for (int i = 0; i < lanes; ++i) lane[i] = uint32_t(i);
  sweep<float>(n, [=](int64_t i, auto at, int) __attribute__((always_inline)) {
    U32 counter = lane + uint32_t(begin + i);
    Pack<float> value = at.load(from + i);
    at.store(to + i, Pack<float>{cut(value.lo, random_bits(counter, key), S{}),
                                 cut(value.hi, random_bits(counter + uint32_t(lanes), key), S{})});
  });
}

}  // namespace

const QuantiseTable quantise_table = {
    load_codes, store_codes, {nullptr, round_stochastically<BFloat16>, round_stochastically<Float16>, nullptr}};

}  // namespace bigmodel::cpu::BIGMODEL_ISA
