// The opcodes that only read and write registers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "ptx.h"

namespace cuda_host::ptx {
namespace {

using b16 = uint16_t;
using b32 = uint32_t;
using b64 = uint64_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using f16 = Half;

// --- floating point --------------------------------------------------------------------------------------------------
float flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }

// Of a number and a NaN, quiet or not, the number; -0 is less than 0.
template <class T>
T smaller(T a, T b) {
  if (a != a || b != b) return a != a ? b : a;
  return a == b ? (std::signbit(a) ? a : b) : std::min(a, b);
}
template <class T>
T larger(T a, T b) {
  if (a != a || b != b) return a != a ? b : a;
  return a == b ? (std::signbit(a) ? b : a) : std::max(a, b);
}

float fused_downwards(float a, float b, float c) {
  const int before = std::fegetround();
  std::fesetround(FE_DOWNWARD);
  volatile float x = a;  // keeps the operation between the two changes of the mode
  volatile float result = std::fma(x, b, c);
  std::fesetround(before);
  return result;
}

float saturated(float value) { return value > 0.0f ? std::fmin(value, 1.0f) : 0.0f; }  // NaN gives 0

// Approximate opcodes err by up to as many ulps as their definition allows, either way, as the operand's bits have it.
float off_by(int most, float result, float operand) {
  if (!std::isnormal(result)) return result;
  const u32 chosen = (bits_as<u32>(operand) * 0x9e3779b9u >> 16) % u32(2 * most + 1);
  const auto moved = bits_as<float>(bits_as<u32>(result) + chosen - u32(most));
  return std::isfinite(moved) ? flushed(moved) : result;
}

float power_of_two(float exponent) {
  const float result = flushed(std::exp2(flushed(exponent)));
  return exponent == std::trunc(exponent) ? result : off_by(2, result, exponent);
}

float reciprocal(float value) {
  const float result = flushed(1.0f / flushed(value));
  int exponent;
  return std::fabs(std::frexp(value, &exponent)) == 0.5f ? result : off_by(1, result, value);
}

// div.approx.f32 takes the divisor's reciprocal, which is 0 where that would be subnormal.
float divided_approximately(float a, float b) {
  if (std::fabs(b) <= 0x1p126f || std::isinf(b) || a != a || b != b) return off_by(2, a / b, b);
  return std::isinf(a) ? std::numeric_limits<float>::quiet_NaN() : std::copysign(0.0f, a) * std::copysign(1.0f, b);
}

// Of input and result only the upper 32 bits count.
double reciprocal_approximate(double value) {
  constexpr uint64_t kUpper = ~uint64_t{0} << 32;
  const auto flush = [](double x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0, x) : x; };
  return bits_as<double>(bits_as<uint64_t>(flush(1.0 / flush(bits_as<double>(bits_as<uint64_t>(value) & kUpper)))) &
                         kUpper);
}

b16 to_bf16(float value) { return __float2bfloat16_rn(value).bits; }

b16 to_f16(float value) { return value != value ? b16(0x7fff) : __float2half_rn(value).bits; }

// Rounds towards zero and clamps. NaN gives 0, but the highest bit alone where either side has 64 bits.
template <class To, class From>
To truncated(From value) {
  if (value != value) return sizeof(To) == 8 || sizeof(From) == 8 ? To(uint64_t{1} << (8 * sizeof(To) - 1)) : To(0);
  if (value <= From(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (value >= From(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return To(value);
}

// --- integers --------------------------------------------------------------------------------------------------------
template <class T>
T wrapping_product(T a, T b) {
  return T(uint64_t(a) * uint64_t(b));
}

template <class T>
T shifted_left(T value, u32 by) {
  return by < 8 * sizeof(T) ? T(value << by) : T(0);
}
template <class T>
T shifted_right(T value, u32 by) {
  constexpr u32 last = 8 * sizeof(T) - 1;
  return by <= last ? T(value >> by) : std::is_signed_v<T> ? T(value >> last) : T(0);
}

// `into` with the low bits of `field` in it, `length` of them from bit `begin` on.
u32 with_field(u32 field, u32 into, u32 begin, u32 length) {
  const u32 ones = shifted_left(length < 32 ? (1u << length) - 1 : ~0u, begin);
  return (into & ~ones) | (shifted_left(field, begin) & ones);
}

// Division by zero has no defined result; all ones is what devices give.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return T(-1);
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return T(0 - uint64_t(a));
  }
  return a / b;
}
template <class T>
T remainder(T a, T b) {
  return b == 0 ? T(-1) : T(uint64_t(a) - uint64_t(b) * uint64_t(quotient(a, b)));
}

// --- moves between one register and two halves -----------------------------------------------------------------------
template <class Whole, class Half>
void move(Frame& f, const Instruction& i) {
  const auto& r = i.registers;
  constexpr int kBits = 8 * sizeof(Half);
  if (i.count == 2) {
    f.set(r[0], f.get<Whole>(r[1]));
  } else if (i.elements == 2) {
    const auto whole = f.get<Whole>(r[2]);
    f.set(r[0], Half(whole));
    f.set(r[1], Half(whole >> kBits));
  } else {
    f.set(r[0], Whole(Whole(f.get<Half>(r[1])) | Whole(f.get<Half>(r[2])) << kBits));
  }
}

// The destination is of type To, the sources a, b and c, as many as there are, of type From.
#define OPERATION(shape, opcode, To, From, expression)                            \
  table[opcode] = {[](Frame& f, const Instruction& i) {                           \
                     [[maybe_unused]] const auto a = f.get<From>(i.registers[1]); \
                     [[maybe_unused]] const auto b = f.get<From>(i.registers[2]); \
                     [[maybe_unused]] const auto c = f.get<From>(i.registers[3]); \
                     f.set<To>(i.registers[0], To(expression));                   \
                   },                                                             \
                   shape}
#define UNARY(opcode, To, From, expression) OPERATION("11", opcode, To, From, expression)
#define BINARY(opcode, To, From, expression) OPERATION("111", opcode, To, From, expression)
#define TERNARY(opcode, To, From, expression) OPERATION("1111", opcode, To, From, expression)
#define COMPARE(name, T, expression) BINARY("setp." name "." #T, u64, T, expression)
#define CONVERT(name, To, From, expression) UNARY("cvt" name "." #To "." #From, To, From, expression)

std::map<std::string, Operation> make_table() {
  std::map<std::string, Operation> table;

#define INTEGER(T)                                                             \
  BINARY("add." #T, T, T, uint64_t(a) + uint64_t(b));                          \
  BINARY("sub." #T, T, T, uint64_t(a) - uint64_t(b));                          \
  UNARY("neg." #T, T, T, 0 - uint64_t(a));                                     \
  BINARY("mul.lo." #T, T, T, wrapping_product(a, b));                          \
  TERNARY("mad.lo." #T, T, T, uint64_t(wrapping_product(a, b)) + uint64_t(c)); \
  BINARY("div." #T, T, T, quotient(a, b));                                     \
  BINARY("rem." #T, T, T, remainder(a, b));                                    \
  BINARY("min." #T, T, T, a < b ? a : b);                                      \
  BINARY("max." #T, T, T, a < b ? b : a);                                      \
  COMPARE("eq", T, a == b);                                                    \
  COMPARE("ne", T, a != b);                                                    \
  COMPARE("lt", T, a < b);                                                     \
  COMPARE("le", T, a <= b);                                                    \
  COMPARE("gt", T, a > b);                                                     \
  COMPARE("ge", T, a >= b)
  INTEGER(u16);
  INTEGER(s16);
  INTEGER(u32);
  INTEGER(s32);
  INTEGER(u64);
  INTEGER(s64);
  BINARY("mul.wide.u16", u32, u16, u32(a) * b);
  BINARY("mul.wide.s16", s32, s16, s32(a) * b);
  BINARY("mul.wide.u32", u64, u32, u64(a) * b);
  BINARY("mul.wide.s32", s64, s32, s64(a) * b);
  BINARY("mul.hi.u32", u32, u32, u64(a) * b >> 32);
  BINARY("mul.hi.s32", s32, s32, s64(a) * b >> 32);

#define BITS(T)                   \
  BINARY("and." #T, T, T, a& b);  \
  BINARY("or." #T, T, T, a | b);  \
  BINARY("xor." #T, T, T, a ^ b); \
  UNARY("not." #T, T, T, ~a);     \
  COMPARE("eq", T, a == b);       \
  COMPARE("ne", T, a != b)
  BITS(b16);
  BITS(b32);
  BITS(b64);
  UNARY("popc.b32", u32, b32, __builtin_popcount(a));
  table["bfi.b32"] = {
      [](Frame& f, const Instruction& i) {
        const auto& r = i.registers;
        f.set(r[0], with_field(f.get<u32>(r[1]), f.get<u32>(r[2]), f.get<u32>(r[3]) & 255, f.get<u32>(r[4]) & 255));
      },
      "11111"};
  BINARY("and.pred", u64, u64, a & b);
  BINARY("or.pred", u64, u64, a | b);
  BINARY("xor.pred", u64, u64, a ^ b);
  UNARY("not.pred", u64, u64, a ^ 1);
  UNARY("mov.pred", u64, u64, a != 0);

#define SHIFT(name, T, function)                                                                                    \
  table[name "." #T] = {[](Frame& f, const Instruction& i) {                                                        \
                          f.set<T>(i.registers[0], function(f.get<T>(i.registers[1]), f.get<u32>(i.registers[2]))); \
                        },                                                                                          \
                        "111"}
  SHIFT("shl", b16, shifted_left);
  SHIFT("shl", b32, shifted_left);
  SHIFT("shl", b64, shifted_left);
  SHIFT("shr", b16, shifted_right);
  SHIFT("shr", b32, shifted_right);
  SHIFT("shr", b64, shifted_right);
  SHIFT("shr", u16, shifted_right);
  SHIFT("shr", u32, shifted_right);
  SHIFT("shr", u64, shifted_right);
  SHIFT("shr", s16, shifted_right);
  SHIFT("shr", s32, shifted_right);
  SHIFT("shr", s64, shifted_right);

#define SELECT(T)                                                                                             \
  table["selp." #T] = {[](Frame& f, const Instruction& i) {                                                   \
                         f.set<T>(i.registers[0], f.get<T>(i.registers[f.get<u64>(i.registers[3]) ? 1 : 2])); \
                       },                                                                                     \
                       "1111"};                                                                               \
  UNARY("mov." #T, T, T, a)
  SELECT(u16);
  SELECT(s16);
  SELECT(u32);
  SELECT(s32);
  SELECT(u64);
  SELECT(s64);
  SELECT(f32);
  SELECT(f64);
  SELECT(b16);
  SELECT(b32);
  SELECT(b64);
  table["mov.b32"] = {move<uint32_t, uint16_t>, "11 21 12"};
  table["mov.b64"] = {move<uint64_t, uint32_t>, "11 21 12"};

#define FLOATING(T)                                  \
  BINARY("add." #T, T, T, a + b);                    \
  BINARY("add.rn." #T, T, T, a + b);                 \
  BINARY("sub." #T, T, T, a - b);                    \
  BINARY("sub.rn." #T, T, T, a - b);                 \
  BINARY("mul." #T, T, T, a* b);                     \
  BINARY("mul.rn." #T, T, T, a* b);                  \
  BINARY("div.rn." #T, T, T, a / b);                 \
  UNARY("rcp.rn." #T, T, T, T(1) / a);               \
  UNARY("sqrt.rn." #T, T, T, std::sqrt(a));          \
  TERNARY("fma.rn." #T, T, T, std::fma(a, b, c));    \
  UNARY("neg." #T, T, T, -a);                        \
  UNARY("abs." #T, T, T, std::fabs(a));              \
  BINARY("copysign." #T, T, T, std::copysign(b, a)); \
  BINARY("min." #T, T, T, smaller(a, b));            \
  BINARY("max." #T, T, T, larger(a, b));             \
  COMPARE("eq", T, a == b);                          \
  COMPARE("ne", T, a == a && b == b && a != b);      \
  COMPARE("lt", T, a < b);                           \
  COMPARE("le", T, a <= b);                          \
  COMPARE("gt", T, a > b);                           \
  COMPARE("ge", T, a >= b);                          \
  COMPARE("equ", T, !(a < b || a > b));              \
  COMPARE("neu", T, a != b);                         \
  COMPARE("ltu", T, !(a >= b));                      \
  COMPARE("leu", T, !(a > b));                       \
  COMPARE("gtu", T, !(a <= b));                      \
  COMPARE("geu", T, !(a < b));                       \
  COMPARE("num", T, a == a && b == b);               \
  COMPARE("nan", T, a != a || b != b)
  FLOATING(f32);
  FLOATING(f64);
  TERNARY("fma.rm.f32", f32, f32, fused_downwards(a, b, c));
  BINARY("div.approx.f32", f32, f32, divided_approximately(a, b));
  UNARY("ex2.approx.ftz.f32", f32, f32, power_of_two(a));
  UNARY("rcp.approx.ftz.f32", f32, f32, reciprocal(a));
  UNARY("rcp.approx.ftz.f64", f64, f64, reciprocal_approximate(a));

  CONVERT("", u16, u32, a);
  CONVERT("", u16, u64, a);
  CONVERT("", u32, u16, a);
  CONVERT("", u32, u64, a);
  CONVERT("", u64, u16, a);
  CONVERT("", u64, u32, a);
  CONVERT("", s32, s16, a);
  CONVERT("", s64, s32, a);
  CONVERT(".rn", f32, s32, a);
  CONVERT(".rn", f32, u32, a);
  CONVERT(".rn", f32, s64, a);
  CONVERT(".rn", f64, s32, a);
  CONVERT(".rn", f64, s64, a);
  CONVERT(".rn", f32, f64, a);
  CONVERT("", f64, f32, a);
  CONVERT(".sat", f32, f32, saturated(a));
  CONVERT(".rni", f32, f32, std::nearbyint(a));
  CONVERT(".rzi", f64, f64, std::trunc(a));
  CONVERT(".rzi", s32, f32, truncated<s32>(a));
  CONVERT(".rzi", u32, f64, truncated<u32>(a));
  CONVERT(".rzi", s64, f64, truncated<s64>(a));
  CONVERT("", f32, f16, a);
  UNARY("cvt.f32.bf16", f32, b16, bits_as<f32>(u32(a) << 16));
  UNARY("cvt.rn.f16.f32", b16, f32, to_f16(a));
  UNARY("cvt.rn.bf16.f32", b16, f32, to_bf16(a));
  BINARY("cvt.rn.f16x2.f32", b32, f32, b32(to_f16(a)) << 16 | to_f16(b));  // the first source on top
  BINARY("cvt.rn.bf16x2.f32", b32, f32, b32(to_bf16(a)) << 16 | to_bf16(b));
  return table;
}

}  // namespace

const std::map<std::string, Operation>& arithmetic() {
  static const std::map<std::string, Operation> table = make_table();
  return table;
}

}  // namespace cuda_host::ptx
