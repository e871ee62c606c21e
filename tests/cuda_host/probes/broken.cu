// One kernel for every check, each broken on purpose in one place. They run in one block of 64 threads unless their row
// in the table at the end says otherwise; n is 64.
#include "launch.cuh"
#include "probes.h"

namespace probe {
namespace {

constexpr int kHalf = 16;

__global__ void reads_past_the_end(float* out, const float* in, int n) {
  out[threadIdx.x] = in[threadIdx.x + (threadIdx.x == 63)];
}

__global__ void writes_an_input(float* out, const float* in, int n) {
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x == 5) const_cast<float*>(in)[5] = 0;
}

__global__ void misaligned_vector(float* out, const float* in, int n) {
  const float* from = in + 4 * threadIdx.x + 1;
  if (threadIdx.x < 15) reinterpret_cast<float4*>(out)[threadIdx.x] = *reinterpret_cast<const float4*>(from);
}

__global__ void writes_before_the_beginning(float* out, const float* in, int n) {
  out[int(threadIdx.x) - 1] = in[threadIdx.x];
}

__global__ void misaligned_in_shared(float* out, const float* in, int n) {
  __shared__ float4 slot[33];
  float* const from = reinterpret_cast<float*>(slot) + 2 * threadIdx.x + n / 64;
  *reinterpret_cast<float2*>(from) = make_float2(in[threadIdx.x], 0);
  out[threadIdx.x] = *from;
}

__global__ void leaves_one_out(float* out, const float* in, int n) {
  if (threadIdx.x != 17) out[threadIdx.x] = in[threadIdx.x];
}

__global__ void reads_its_output(float* out, const float* in, int n) { out[threadIdx.x] += in[threadIdx.x]; }

__global__ void reads_unwritten_shared(float* out, const float* in, int n) {
  __shared__ float slot[64];
  if (threadIdx.x < 63) slot[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = slot[threadIdx.x];
}

__global__ void past_dynamic_shared(float* out, const float* in, int n) {  // with 64 floats of it
  float* slot = reinterpret_cast<float*>(dynamic_shared);
  slot[threadIdx.x + (threadIdx.x == 63)] = in[threadIdx.x];
  out[threadIdx.x] = slot[threadIdx.x];
}

__global__ void misses_a_barrier(float* out, const float* in, int n) {
  __shared__ float slot[64];
  slot[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = slot[63 - threadIdx.x];
}

__global__ void misses_the_second_barrier(float* out, const float* in, int n) {
  __shared__ float slot[64];
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    slot[threadIdx.x] = in[threadIdx.x] + i;
    __syncthreads();
    sum += slot[63 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

__global__ void misses_a_warp_barrier(float* out, const float* in, int n) {
  __shared__ float slot[64];
  slot[threadIdx.x] = in[threadIdx.x];
  const float neighbour = slot[threadIdx.x ^ 1];
  __syncthreads();
  out[threadIdx.x] = neighbour;
}

__global__ void all_write_one_word(float* out, const float* in, int n) {
  out[threadIdx.x] = in[threadIdx.x];
  out[7] = 0;
}

__global__ void blocks_write_one_word(float* out, const float* in, int n) {  // two blocks
  if (threadIdx.x < 32) out[32 * blockIdx.x + threadIdx.x] = in[32 * blockIdx.x + threadIdx.x];
  if (threadIdx.x == 40) out[60] = 0;
}

__global__ void block_reads_anothers(float* out, const float* in, int n) {  // two blocks
  if (threadIdx.x >= 32) return;
  out[32 * blockIdx.x + threadIdx.x] = blockIdx.x == 0 ? 1 : out[threadIdx.x];
}

__global__ void some_skip_a_barrier(float* out, const float* in, int n) {
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void barriers_in_two_branches(float* out, const float* in, int n) {
  if (threadIdx.x < 32) {
    out[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
  } else {
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
  }
}

__global__ void some_skip_a_shuffle(float* out, const float* in, int n) {
  float value = in[threadIdx.x];
  if (threadIdx.x % 32 < 20) value += __shfl_xor_sync(~0u, value, 1);
  out[threadIdx.x] = value;
}

__global__ void some_skip_a_vote(float* out, const float* in, int n) {
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x != 3) out[threadIdx.x] += float(__any_sync(~0u, in[threadIdx.x] > 0));
}

__global__ void some_skip_a_reduction(float* out, const float* in, int n) {
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x < 40) out[threadIdx.x] += float(__reduce_add_sync(~0u, threadIdx.x));
}

__global__ void some_skip_a_warp_barrier(float* out, const float* in, int n) {
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x % 2 == 0) __syncwarp();
}

__global__ void shuffle_from_outside_the_mask(float* out, const float* in, int n) {
  float value = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) value = __shfl_sync(0xffff, value, threadIdx.x % 32 + 1);
  out[threadIdx.x] = value;
}

__global__ void shuffle_without_its_own_lane(float* out, const float* in, int n) {
  out[threadIdx.x] = __shfl_sync(0xfffffffe, in[threadIdx.x], 1);
}

__global__ void two_shuffles_at_once(float* out, const float* in, int n) {
  float value = in[threadIdx.x];
  if (threadIdx.x % 2) value = __shfl_down_sync(~0u, value, 1);
  else value = __shfl_up_sync(~0u, value, 1);
  out[threadIdx.x] = value;
}

__global__ void names_missing_lanes(float* out, const float* in, int n) {  // one block of 48
  out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 1);
  if (threadIdx.x < 16) out[48 + threadIdx.x] = 0;
}

__global__ void reads_before_the_copy_landed(float* out, const float* in, int n) {
  __shared__ float slot[64];
  __pipeline_memcpy_async(&slot[threadIdx.x], &in[threadIdx.x], 4);
  __pipeline_commit();
  out[threadIdx.x] = slot[threadIdx.x];
}

__global__ void reads_anothers_copy(float* out, const float* in, int n) {
  __shared__ float slot[64];
  __pipeline_memcpy_async(&slot[threadIdx.x], &in[threadIdx.x], 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  out[threadIdx.x] = slot[63 - threadIdx.x];
}

__global__ void waits_after_anothers_read(float* out, const float* in, int n) {
  __shared__ float slot[64];
  __pipeline_memcpy_async(&slot[threadIdx.x], &in[threadIdx.x], 4);
  __pipeline_commit();
  __syncthreads();
  out[threadIdx.x] = slot[63 - threadIdx.x];
  __syncthreads();
  __pipeline_wait_prior(0);
}

__global__ void waits_for_the_group_before(float* out, const float* in, int n) {
  __shared__ float slot[2][64];
  for (int i = 0; i < 2; ++i) {
    __pipeline_memcpy_async(&slot[i][threadIdx.x], &in[threadIdx.x], 4);
    __pipeline_commit();
  }
  __pipeline_wait_prior(1);
  __syncthreads();
  out[threadIdx.x] = slot[0][63 - threadIdx.x] + slot[1][63 - threadIdx.x];
}

__global__ void writes_where_a_copy_comes_from(float* out, const float* in, int n) {
  __shared__ float slot[64];
  out[threadIdx.x] = in[threadIdx.x];
  __pipeline_memcpy_async(&slot[threadIdx.x], &out[threadIdx.x], 4);
  __pipeline_commit();
  __syncthreads();
  out[63 - threadIdx.x] = 0;
  __pipeline_wait_prior(0);
}

__global__ void leaves_the_cluster_early(float* out, const float* in, int n) {  // two blocks in a cluster
  __shared__ float slot[64];
  slot[threadIdx.x] = in[threadIdx.x];
  cooperative_groups::this_cluster().sync();
  const float* other = cooperative_groups::this_cluster().map_shared_rank(slot, 1 - blockIdx.x);
  if (threadIdx.x < 32) out[32 * blockIdx.x + threadIdx.x] = other[threadIdx.x];
}

__global__ void enters_the_cluster_early(float* out, const float* in, int n) {  // two blocks in a cluster
  __shared__ float slot[64];
  *cooperative_groups::this_cluster().map_shared_rank(&slot[threadIdx.x], 1 - blockIdx.x) = in[threadIdx.x];
  cooperative_groups::this_cluster().sync();
  if (threadIdx.x < 32) out[32 * blockIdx.x + threadIdx.x] = slot[threadIdx.x];
}

__global__ void misses_a_cluster_barrier(float* out, const float* in, int n) {  // two blocks in a cluster
  __shared__ float slot[64];
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  *cluster.map_shared_rank(&slot[threadIdx.x], 1 - blockIdx.x) = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 32) out[32 * blockIdx.x + threadIdx.x] = slot[threadIdx.x];
  cluster.sync();
}

__global__ void a_block_skips_the_cluster_barrier(float* out, const float* in, int n) {  // two blocks in a cluster
  if (threadIdx.x < 32) out[32 * blockIdx.x + threadIdx.x] = in[threadIdx.x];
  if (blockIdx.x == 0) cooperative_groups::this_cluster().sync();
}

__global__ void too_much_static_shared(float* out, const float* in, int n) {
  __shared__ float slot[13 * 1024];
  slot[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = slot[threadIdx.x];
}

#ifdef __CUDACC__
constexpr int kTooMuch = 1;  // nvcc refuses more
#else
constexpr int kTooMuch = 32 * 1024;
#endif
struct Large { char bytes[kTooMuch]; };
__global__ void takes_too_much(float* out, const float* in, int n, Large) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void too_much_shared_together(float* out, const float* in, int n) {
  __shared__ float slot[1024];
  slot[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = slot[threadIdx.x];
}

__global__ void copies(float* out, const float* in, int n) {
  if (threadIdx.x < n && blockIdx.x == 0) out[threadIdx.x] = in[threadIdx.x];
}

__global__ void asks_for_another_size(float* out, const float* in, int n) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void __launch_bounds__(2 * kHalf, 2) bounded(float* out, const float* in, int n) { out[threadIdx.x] = in[threadIdx.x]; }

template <Kernel kernel>
void once(float* out, const float* in, int n) {
  launch(kernel, out, in, n, 1, 64);
}
template <Kernel kernel>
void two_blocks(float* out, const float* in, int n) {
  launch(kernel, out, in, n, 2, 64);
}
template <Kernel kernel>
void a_pair(float* out, const float* in, int n) {
  launch(kernel, out, in, n, 2, 64, 2);
}

void with_dynamic(float* out, const float* in, int n) { launch(past_dynamic_shared, out, in, n, 1, 64, 1, 256); }
void with_48_threads(float* out, const float* in, int n) { launch(names_missing_lanes, out, in, n, 1, 48); }
void block_too_large(float* out, const float* in, int n) { launch(copies, out, in, n, 1, dim3(32, 33)); }
void block_too_deep(float* out, const float* in, int n) { launch(copies, out, in, n, 1, dim3(1, 1, 65)); }
void grid_too_tall(float* out, const float* in, int n) { launch(copies, out, in, n, dim3(1, 65536), 64); }
void grid_empty(float* out, const float* in, int n) { launch(copies, out, in, n, 0, 64); }
void cluster_too_large(float* out, const float* in, int n) { launch(copies, out, in, n, 16, 64, 16); }
void cluster_does_not_divide(float* out, const float* in, int n) { launch(copies, out, in, n, 5, 64, 2); }
void cluster_on_sm_80(float* out, const float* in, int n) {
  cudaSetDevice(1);
  struct Back {
    ~Back() { cudaSetDevice(0); }
  } back;
  launch(copies, out, in, n, 2, 64, 2);
}
void dynamic_beyond_the_device(float* out, const float* in, int n) {
  constexpr int kBytes = 227 * 1024 + 4;
  cudaFuncSetAttribute(copies, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);  // refused
  launch(copies, out, in, n, 1, 64, 1, kBytes);
}
void with_another_size(float* out, const float* in, int n) {  // asks for nothing where n is 0
  for (int bytes : {100 * 1024, 60 * 1024}) {
    if (n) cudaFuncSetAttribute(asks_for_another_size, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    launch(asks_for_another_size, out, in, n, 1, 64, 1, size_t(bytes));
  }
}
void static_and_dynamic(float* out, const float* in, int n) {
  constexpr int kBytes = 227 * 1024;
  cudaFuncSetAttribute(too_much_shared_together, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  launch(too_much_shared_together, out, in, n, 1, 64, 1, kBytes);
}
void with_large_arguments(float* out, const float* in, int n) {
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = 64;
  cudaLaunchKernelEx(&config, takes_too_much, out, in, n, Large{});
}
void beyond_its_launch_bounds(float* out, const float* in, int n) { launch(bounded, out, in, n, 1, 33); }
void leaves_another_device(float* out, const float* in, int n) {
  cudaSetDevice(2);
  launch(copies, out, in, n, 1, 64);
}
void wakes_another_device(float* out, const float* in, int n) {  // its caller has none, so it has none to give back
  int caller = 0;
  cudaGetDevice(&caller);
  cudaSetDevice(2);
  launch(copies, out, in, n, 1, 64);
  cudaSetDevice(caller);
}
void dynamic_without_asking(float* out, const float* in, int n) { launch(copies, out, in, n, 1, 64, 1, 48 * 1024 + 4); }

}  // namespace

const Probe kBroken[] = {
    {"reads_past_the_end", once<reads_past_the_end>},
    {"writes_an_input", once<writes_an_input>},
    {"misaligned_vector", once<misaligned_vector>},
    {"writes_before_the_beginning", once<writes_before_the_beginning>},
    {"misaligned_in_shared", once<misaligned_in_shared>},
    {"leaves_one_out", once<leaves_one_out>},
    {"reads_its_output", once<reads_its_output>},
    {"reads_unwritten_shared", once<reads_unwritten_shared>},
    {"past_dynamic_shared", with_dynamic},
    {"misses_a_barrier", once<misses_a_barrier>},
    {"misses_the_second_barrier", once<misses_the_second_barrier>},
    {"misses_a_warp_barrier", once<misses_a_warp_barrier>},
    {"all_write_one_word", once<all_write_one_word>},
    {"blocks_write_one_word", two_blocks<blocks_write_one_word>},
    {"block_reads_anothers", two_blocks<block_reads_anothers>},
    {"some_skip_a_barrier", once<some_skip_a_barrier>},
    {"barriers_in_two_branches", once<barriers_in_two_branches>},
    {"some_skip_a_shuffle", once<some_skip_a_shuffle>},
    {"some_skip_a_vote", once<some_skip_a_vote>},
    {"some_skip_a_reduction", once<some_skip_a_reduction>},
    {"some_skip_a_warp_barrier", once<some_skip_a_warp_barrier>},
    {"shuffle_from_outside_the_mask", once<shuffle_from_outside_the_mask>},
    {"shuffle_without_its_own_lane", once<shuffle_without_its_own_lane>},
    {"two_shuffles_at_once", once<two_shuffles_at_once>},
    {"names_missing_lanes", with_48_threads},
    {"reads_before_the_copy_landed", once<reads_before_the_copy_landed>},
    {"reads_anothers_copy", once<reads_anothers_copy>},
    {"waits_after_anothers_read", once<waits_after_anothers_read>},
    {"waits_for_the_group_before", once<waits_for_the_group_before>},
    {"writes_where_a_copy_comes_from", once<writes_where_a_copy_comes_from>},
    {"leaves_the_cluster_early", a_pair<leaves_the_cluster_early>},
    {"enters_the_cluster_early", a_pair<enters_the_cluster_early>},
    {"misses_a_cluster_barrier", a_pair<misses_a_cluster_barrier>},
    {"a_block_skips_the_cluster_barrier", a_pair<a_block_skips_the_cluster_barrier>},
    {"too_much_static_shared", once<too_much_static_shared>},
    {"block_too_large", block_too_large},
    {"block_too_deep", block_too_deep},
    {"grid_too_tall", grid_too_tall},
    {"grid_empty", grid_empty},
    {"cluster_too_large", cluster_too_large},
    {"cluster_does_not_divide", cluster_does_not_divide},
    {"cluster_on_sm_80", cluster_on_sm_80},
    {"beyond_its_launch_bounds", beyond_its_launch_bounds},
    {"leaves_another_device", leaves_another_device},
    {"wakes_another_device", wakes_another_device},
    {"dynamic_without_asking", dynamic_without_asking},
    {"asks_for_another_size", with_another_size},
    {"dynamic_beyond_the_device", dynamic_beyond_the_device},
    {"too_much_shared_together", static_and_dynamic},
    {"takes_too_much", with_large_arguments},
    {nullptr, nullptr},
};

}  // namespace probe
