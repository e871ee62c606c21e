// The part of CUDA's runtime interface that the sources use, on top of the executor. Names and meanings are CUDA's.
#pragma once

#include <array>
#include <cstring>
#include <utility>

#include "cuda_host/executor.h"
#include "cuda_host/intrinsics.h"
#include "cuda_host/qualifiers.h"
#include "vector_types.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorSymbolNotFound = 500,
};
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    default: return "an error that the host executor never gives";
  }
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

// --- devices ---------------------------------------------------------------------------------------------------------
using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlock,
  cudaDevAttrWarpSize,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxBlocksPerMultiprocessor,
  cudaDevAttrClusterLaunch,
};

inline cudaError_t cudaGetDeviceCount(int* count) { return *count = cuda_host::device_count(), cudaSuccess; }
inline cudaError_t cudaGetDevice(int* index) { return *index = cuda_host::current_device(), cudaSuccess; }
inline cudaError_t cudaSetDevice(int index) {
  return cuda_host::set_current_device(index) ? cudaSuccess : cudaErrorInvalidDevice;
}

// Of the driver, the functions for the context of the calling thread: a handle is the address of its device.
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const auto get = [](void** context) {
    const int index = cuda_host::current_context();
    *context = index < 0 ? nullptr : const_cast<cuda_host::Device*>(&cuda_host::device(index));
    return 0;
  };
  const auto set = [](void* context) {
    cuda_host::set_current_context(context ? int(static_cast<cuda_host::Device*>(context) - &cuda_host::device(0))
                                           : -1);
    return 0;
  };
  *function = nullptr;
  if (!std::strcmp(name, "cuCtxGetCurrent")) *function = reinterpret_cast<void*>(+get);
  if (!std::strcmp(name, "cuCtxSetCurrent")) *function = reinterpret_cast<void*>(+set);
  *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index < 0 || index >= cuda_host::device_count()) return cudaErrorInvalidDevice;
  const cuda_host::Device& device = cuda_host::device(index);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = cuda_host::kThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = cuda_host::kSharedBytesPerBlock; break;
    case cudaDevAttrWarpSize: *value = warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = device.threads_per_multiprocessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device.minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.shared_bytes_per_multiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_bytes_per_block; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = device.blocks_per_multiprocessor; break;
    case cudaDevAttrClusterLaunch: *value = device.cluster_blocks > 1; break;
  }
  return cudaSuccess;
}

// --- kernels and their launches --------------------------------------------------------------------------------------
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  const void* const which = reinterpret_cast<const void*>(kernel);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    cuda_host::attributes(which).nonportable_cluster = value != 0;
    return cudaSuccess;
  }
  return cuda_host::ask_for_dynamic_shared(which, value) ? cudaSuccess : cudaErrorInvalidValue;
}

struct cudaFuncAttributes { int maxThreadsPerBlock, ptxVersion, binaryVersion; };
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  const cuda_host::Device& device = cuda_host::device(cuda_host::current_device());
  const int version = device.major * 10 + device.minor;
  *attributes = {cuda_host::kThreadsPerBlock, version, version};
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeClusterDimension = 4 };

union cudaLaunchAttributeValue {
  struct { unsigned x, y, z; } clusterDim;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_host {

inline dim3 cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& cluster = config.attrs[i].val.clusterDim;
    return dim3(cluster.x, cluster.y, cluster.z);
  }
  return dim3(1, 1, 1);
}

}  // namespace cuda_host

// As if registers never were the limit: those are the compiler's.
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int threads,
                                                          size_t dynamic_bytes) {
  const cuda_host::Device& device = cuda_host::device(cuda_host::current_device());
  const int by_threads = device.threads_per_multiprocessor / ((threads + warpSize - 1) / warpSize * warpSize);
  const int by_memory = device.shared_bytes_per_multiprocessor / (int(dynamic_bytes) + device.shared_bytes_reserved);
  *blocks = min(min(by_threads, by_memory), device.blocks_per_multiprocessor);
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
  const dim3 block = config->blockDim, cluster = cuda_host::cluster_of(*config);
  const int threads = int(block.x * block.y * block.z);
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, config->dynamicSmemBytes);
  blocks *= cuda_host::device(cuda_host::current_device()).multiprocessors;
  *clusters = blocks / int(cluster.x * cluster.y * cluster.z);
  return cudaSuccess;
}

// --- launching -------------------------------------------------------------------------------------------------------
namespace cuda_host {

// A kernel's arguments as a device finds them: in order, each at a multiple of its alignment.
template <class... Parameters>
struct Arguments {
  template <size_t... I>
  static constexpr auto offsets(std::index_sequence<I...>) {
    std::array<size_t, sizeof...(Parameters) + 1> at{};
    const auto aligned = [](size_t offset, size_t alignment) {
      return (offset + alignment - 1) / alignment * alignment;
    };
    ((at[I] = aligned(at[I], alignof(Parameters)), at[I + 1] = at[I] + sizeof(Parameters)), ...);
    return at;
  }
  using Indices = std::index_sequence_for<Parameters...>;
  static constexpr auto kAt = offsets(Indices{});

  template <class... Given>
  explicit Arguments(Given&&... given) {
    write(Indices{}, Parameters(std::forward<Given>(given))...);
  }

  template <size_t... I>
  void write(std::index_sequence<I...>, const Parameters&... values) {
    (std::memcpy(bytes + kAt[I], &values, sizeof values), ...);
  }

  static void call(const void* kernel, const void* bytes) { call(kernel, bytes, Indices{}); }
  template <size_t... I>
  static void call(const void* kernel, const void* bytes, std::index_sequence<I...>) {
    const auto* from = static_cast<const unsigned char*>(bytes);
    reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(kernel))(
        *reinterpret_cast<const std::remove_cv_t<Parameters>*>(from + kAt[I])...);
  }

  alignas(16) unsigned char bytes[kAt.back() ? kAt.back() : 1];
};

}  // namespace cuda_host

// Runs the whole grid before it returns. What a device would refuse, or a check finds, is thrown.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const cuda_host::Arguments<Parameters...> values(std::forward<Arguments>(arguments)...);
  const cuda_host::LaunchShape shape{config->gridDim, config->blockDim, cuda_host::cluster_of(*config),
                                     config->dynamicSmemBytes};
  cuda_host::launch(shape, reinterpret_cast<const void*>(kernel), cuda_host::Arguments<Parameters...>::call,
                    values.bytes, sizeof values.bytes);
  return cudaSuccess;
}
