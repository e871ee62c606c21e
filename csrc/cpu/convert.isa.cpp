#include "convert.h"

#include "vec.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

template <class To, class From>
void convert(void* to_, const void* from_, int64_t n) {
  auto* to = static_cast<To*>(to_);
  auto* from = static_cast<const From*>(from_);
  sweep<float>(n, [=](int64_t i, auto at, int) __attribute__((always_inline)) { at.store(to + i, at.load(from + i)); });
}

// Between float64 and the others; a 16-bit type goes through float, as torch's own conversion does.
template <class From>
void to_double(void* to_, const void* from_, int64_t n) {
  auto* to = static_cast<double*>(to_);
  float part[256];
  for (int64_t i = 0; i < n; i += 256) {
    int count = n - i < 256 ? int(n - i) : 256;
    convert<float, From>(part, static_cast<const From*>(from_) + i, count);
    for (int j = 0; j < count; ++j) to[i + j] = part[j];
  }
}

template <class To>
void from_double(void* to_, const void* from_, int64_t n) {
  auto* from = static_cast<const double*>(from_);
  float part[256];
  for (int64_t i = 0; i < n; i += 256) {
    int count = n - i < 256 ? int(n - i) : 256;
    for (int j = 0; j < count; ++j) part[j] = float(from[i + j]);
    convert<To, float>(static_cast<To*>(to_) + i, part, count);
  }
}

void copy_double(void* to, const void* from, int64_t n) { memcpy(to, from, n * sizeof(double)); }

template <class S>
void add(void* sum_, const void* a_, const void* b_, int64_t n) {
  auto* sum = static_cast<S*>(sum_);
  auto *a = static_cast<const S*>(a_), *b = static_cast<const S*>(b_);
  sweep<Compute<S>>(n, [=](int64_t i, auto at, int)
                           __attribute__((always_inline)) { at.store(sum + i, at.load(a + i) + at.load(b + i)); });
}

}  // namespace

const ConvertTable convert_table = {
    {{convert<float, float>, convert<float, BFloat16>, convert<float, Float16>, from_double<float>},
     {convert<BFloat16, float>, convert<BFloat16, BFloat16>, convert<BFloat16, Float16>, from_double<BFloat16>},
     {convert<Float16, float>, convert<Float16, BFloat16>, convert<Float16, Float16>, from_double<Float16>},
     {to_double<float>, to_double<BFloat16>, to_double<Float16>, copy_double}},
    {add<float>, add<BFloat16>, add<Float16>, add<double>}};

}  // namespace bigmodel::cpu::BIGMODEL_ISA
