// Kernels that are right, to show that the executor computes what a device does and that no check cries wolf. One block
// of 64 threads unless the table at the end says otherwise; n is 64.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"
#include "probes.h"

namespace probe {
namespace {

__device__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  return value;
}

__global__ void block_sum(float* out, const float* in, int n) {  // out[i] is the sum of 64 floats of block i
  __shared__ float of_warp[2];
  const float sum = warp_sum(in[64 * blockIdx.x + threadIdx.x]);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = of_warp[0] + of_warp[1];
}

__global__ void tree_in_dynamic_shared(float* out, const float* in, int n) {
  float* slot = reinterpret_cast<float*>(dynamic_shared);
  slot[threadIdx.x] = in[threadIdx.x];
  for (int half = 32; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) slot[threadIdx.x] += slot[threadIdx.x + half];
  }
  __syncthreads();
  out[threadIdx.x] = slot[0];
}

__global__ void cluster_sum(float* out, const float* in, int n) {  // clusters of 4 blocks; out[i] as for block_sum
  __shared__ float of_block[4];
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  __shared__ float of_warp[2];
  const float sum = warp_sum(in[64 * blockIdx.x + threadIdx.x]);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < cluster.num_blocks()) {
    *cluster.map_shared_rank(&of_block[cluster.block_rank()], threadIdx.x) = of_warp[0] + of_warp[1];
  }
  cluster.sync();
  if (threadIdx.x == 0) out[blockIdx.x] = of_block[0] + of_block[1] + of_block[2] + of_block[3];
}

__global__ void reads_the_next_block(float* out, const float* in, int n) {  // clusters of 4 blocks, split barrier
  __shared__ float slot[64];
  const auto cluster = cooperative_groups::this_cluster();
  slot[threadIdx.x] = in[64 * blockIdx.x + threadIdx.x];
  cluster.barrier_arrive();
  cluster.barrier_wait();
  const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
  out[64 * blockIdx.x + threadIdx.x] = cluster.map_shared_rank(slot, next)[threadIdx.x];
  cluster.barrier_arrive();
  cluster.barrier_wait();
}

// 64 rows of 8: what each warp function gives to each thread, which gives it its lane.
__global__ void warp_functions(float* out, const float* in, int n) {
  const int lane = threadIdx.x % 32;
  float* row = out + 8 * threadIdx.x;
  row[0] = __shfl_up_sync(~0u, lane, 3, 16);
  row[1] = float(__shfl_down_sync(~0u, double(lane), 3, 16));
  row[2] = __shfl_sync(~0u, lane, 37, 8);
  row[3] = __shfl_xor_sync(~0u, lane, 24, 16);
  row[4] = __popc(__ballot_sync(~0u, lane % 3 == 0));
  row[5] = __any_sync(~0u, lane == 31) + 2 * __all_sync(~0u, lane < 31);
  row[6] = __reduce_max_sync(~0u, -lane - 1) + int(__reduce_add_sync(~0u, unsigned(lane)));
  row[7] = __syncthreads_count(lane == 4);
}

__global__ void warp_exchange(float* out, const float* in, int n) {
  __shared__ float slot[64];
  slot[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  const float neighbour = slot[threadIdx.x ^ 1];
  __syncwarp();
  slot[threadIdx.x] = 2 * neighbour;
  const bool odd = threadIdx.x % 2;
  if (odd) __syncwarp(0xaaaaaaaa);
  out[threadIdx.x] = slot[threadIdx.x];
}

__global__ void double_buffered_copy(float* out, const float* in, int n) {  // 8 tiles of 64, two in flight
  __shared__ float tile[2][64];
  float sum = 0;
  __pipeline_memcpy_async(&tile[0][threadIdx.x], &in[threadIdx.x], 4);
  __pipeline_commit();
  for (int i = 0; i < 8; ++i) {
    if (i < 7) __pipeline_memcpy_async(&tile[(i + 1) % 2][threadIdx.x], &in[64 * (i + 1) + threadIdx.x], 4);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    sum += tile[i % 2][63 - threadIdx.x];
    __syncthreads();
  }
  out[threadIdx.x] = sum;
}

__global__ void strided(float* out, const float* in, int n) {  // 32 threads; in holds 32 x 32
  __shared__ float tile[32][32], padded[32][33];
  for (int i = 0; i < 32; ++i) tile[i][threadIdx.x] = padded[i][threadIdx.x] = in[32 * threadIdx.x + i];
  __syncwarp();
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += tile[threadIdx.x][i] + padded[threadIdx.x][i];
  out[threadIdx.x] = sum;
}

__global__ void to_low_precision(float* out, const float* in, int n) {  // out: n bfloat16, then n float16
  auto* bf16 = reinterpret_cast<__nv_bfloat16*>(out);
  auto* fp16 = reinterpret_cast<__half*>(bf16 + n);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    bf16[i] = __float2bfloat16_rn(in[i]);
    fp16[i] = __float2half_rn(in[i]);
  }
}

template <Kernel kernel>
void once(float* out, const float* in, int n) {
  launch(kernel, out, in, n, 1, 64);
}
void dynamic(float* out, const float* in, int n) { launch(tree_in_dynamic_shared, out, in, n, 1, 64, 1, 256); }
void blocks(float* out, const float* in, int n) { launch(block_sum, out, in, n, unsigned(n / 64), 64); }
void clusters(float* out, const float* in, int n) { launch(cluster_sum, out, in, n, unsigned(n / 64), 64, 4); }
void next_blocks(float* out, const float* in, int n) {
  launch(reads_the_next_block, out, in, n, unsigned(n / 64), 64, 4);
}
void one_warp(float* out, const float* in, int n) { launch(strided, out, in, n, 1, 32); }
void many(float* out, const float* in, int n) { launch(to_low_precision, out, in, n, 4, 256); }

}  // namespace

const Probe kCorrect[] = {
    {"block_sum", blocks},
    {"tree_in_dynamic_shared", dynamic},
    {"cluster_sum", clusters},
    {"reads_the_next_block", next_blocks},
    {"warp_functions", once<warp_functions>},
    {"warp_exchange", once<warp_exchange>},
    {"double_buffered_copy", once<double_buffered_copy>},
    {"strided", one_warp},
    {"to_low_precision", many},
    {nullptr, nullptr},
};

}  // namespace probe
