// What every op shares: the dtype codes that cross the Python border, and where a call runs.
#pragma once

#include <cstdint>
#include <stdexcept>

#if defined(__CUDACC__)
#define BIGMODEL_SHARED __host__ __device__
#else
#define BIGMODEL_SHARED
#endif

namespace bigmodel {

// Element types; the codes are mirrored by bigmodel._native.DTYPE_CODES.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };
constexpr int kDTypes = 4;

BIGMODEL_SHARED constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return 4;
    case DType::float64: return 8;
    default: return 2;
  }
}

// Storage formats of the 16-bit types; arithmetic is always in float32.
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class T> struct Tag { using type = T; };

// Calls visitor(Tag<T>{}) with the storage type behind a dtype code.
template <class Visitor>
auto visit_dtype(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::float32: return visitor(Tag<float>{});
    case DType::bfloat16: return visitor(Tag<BFloat16>{});
    case DType::float16: return visitor(Tag<Float16>{});
    case DType::float64: return visitor(Tag<double>{});
  }
  throw std::invalid_argument("unknown dtype code");
}

// Where a call runs. CPU: `index` is the number of threads to use, `stream` is unused.
// CUDA: `index` is the device ordinal, `stream` the cudaStream_t. Always the last argument.
struct Exec {
  int index;
  void* stream;
};

}  // namespace bigmodel
