// What every CUDA op shares: errors, the device, the launch (the only one in the project), sums over a row, and
// asynchronous copies. Packs and dtypes are in pack.cuh.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../op.h"

namespace bigmodel::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;                 // of a block; leaves each of them 128 registers
constexpr int kMaxCluster = 8;                   // the largest cluster that every device with clusters accepts
constexpr int64_t kStaticSharedBytes = 1 << 10;  // the most that a kernel with dynamic shared memory declares
constexpr int64_t kSharedWithoutAsking = (48 << 10) - kStaticSharedBytes;

// Throws std::runtime_error: the op's name, CUDA's own words, and what is missing where CUDA does not say it.
[[noreturn]] void fail(const char* op, cudaError_t error);

inline void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) fail(op, error);
}

struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // the most of it, dynamic, that one block may ask for
  bool clusters;
};

// Read once per process; throws on an ordinal that does not exist.
const Device& device(const char* op, int index);
const Device& current_device(const char* op);

// Makes a device current and gives the calling thread back what it had: a context, or none. Giving back an ordinal
// would make a context, hundreds of MB, on device 0 in every process of a job whose tensors lie elsewhere.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* previous_ = nullptr;
  bool moved_ = false;
};

// One kernel launch: `cluster` blocks with consecutive blockIdx.x share their shared memory.
struct LaunchConfig {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  template <class... Parameters>
  LaunchConfig(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, int cluster, void* stream,
               const char* op) {
    // The limit is the kernel's on this device: set to what this launch needs, it could be below what another thread's
    // needs, between that one's call and its launch.
    if (shared_bytes > kSharedWithoutAsking)
      check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     int(current_device(op).shared_bytes)));
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, int cluster, void* stream,
            const char* op, Arguments&&... arguments) {
  const LaunchConfig launch(kernel, grid, block, shared_bytes, cluster, stream, op);
  check(op, cudaLaunchKernelEx(&launch.config, kernel, std::forward<Arguments>(arguments)...));
}

// How many clusters of that shape the current device holds at once: fewer than its SMs would give, since a cluster
// stays within one group of them.
template <class... Parameters>
int active_clusters(void (*kernel)(Parameters...), dim3 block, int64_t shared_bytes, int cluster, const char* op) {
  const LaunchConfig launch(kernel, dim3(cluster), block, shared_bytes, cluster, nullptr, op);
  int clusters = 0;
  check(op, cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config));
  return std::max(clusters, 1);
}

// Whether the code that the current device would run for this kernel knows clusters: an older virtual architecture,
// compiled on the spot for a newer device, does not. ptxVersion is that architecture, __CUDA_ARCH__ / 10, of a cubin as
// well, which carries it (CUB chooses what to launch by it); binaryVersion is the device's own in either case.
template <class... Parameters>
bool compiled_with_clusters(void (*kernel)(Parameters...), const char* op) {
  cudaFuncAttributes attributes;
  check(op, cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

extern __shared__ uint4 dynamic_shared[];

// Every thread of a cluster arrives, goes on, and later waits for the others. Nothing else makes sure that a block
// whose shared memory is written to has started.
__device__ inline void cluster_arrive() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}
__device__ inline void cluster_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_wait();
#endif
}

// The same variable in the shared memory of another block of the cluster.
template <class T>
__device__ T* cluster_shared(T* own, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
#else
  return own;
#endif
}

// 16 bytes from global to shared memory without passing through registers. A thread may read what it has copied itself
// once wait_copies<N>() says that all but its N youngest groups have arrived.
__device__ inline void copy_async(uint4* to_shared, const void* from_global) {
  __pipeline_memcpy_async(to_shared, from_global, sizeof(uint4));
}
__device__ inline void commit_copies() { __pipeline_commit(); }
template <int N>
__device__ void wait_copies() {
  __pipeline_wait_prior(N);
}

// Sum over `lanes` (a power of two up to a warp) neighbours, in an order that depends on nothing else.
template <class C>
__device__ C lane_sum(C value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Sums N values over the threads of one row, in a fixed order: the lanes of a warp, the warps, the blocks of a cluster.
// The row's threads are threadIdx.x: a power of two up to a warp, or whole warps. Every thread of the block, and of the
// cluster, must call it, and the cluster must have met before the first call.
template <class C, int N>
class RowSum {
 public:
  __device__ explicit RowSum(int cluster) : cluster_(cluster) {}

  __device__ void operator()(C (&value)[N]) {
    // Two sets of slots: a thread may enter the next sum while others still read this one's.
    __shared__ C of_warp[2][N][kMaxThreads / kWarp];
    __shared__ C of_block[2][N][kMaxCluster];
    const int lanes = blockDim.x;
    for (C& v : value) v = lane_sum(v, min(lanes, kWarp));
    if (lanes > kWarp) {
      const int warps = lanes / kWarp, first = threadIdx.y * warps, lane = threadIdx.x % kWarp;
      if (lane == 0)
        for (int n = 0; n < N; ++n) of_warp[phase_][n][first + threadIdx.x / kWarp] = value[n];
      __syncthreads();
      for (int n = 0; n < N; ++n) value[n] = lane_sum(lane < warps ? of_warp[phase_][n][first + lane] : C(0), kWarp);
    }
    if (cluster_ > 1) {
      if (threadIdx.x < cluster_)
        for (int n = 0; n < N; ++n)
          *cluster_shared(&of_block[phase_][n][blockIdx.x % cluster_], threadIdx.x) = value[n];
      cluster_arrive();
      cluster_wait();
      for (int n = 0; n < N; ++n) {
        value[n] = 0;
        for (int block = 0; block < cluster_; ++block) value[n] += of_block[phase_][n][block];
      }
    }
    phase_ ^= 1;
  }

 private:
  int cluster_, phase_ = 0;
};

}  // namespace bigmodel::cuda
