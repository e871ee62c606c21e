// How the test kernels are launched: one helper, and the signature that their binding knows.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

namespace probe {

// out and in hold n floats, unless a kernel's comment says otherwise.
using Kernel = void (*)(float* out, const float* in, int n);

extern __shared__ uint4 dynamic_shared[];

inline void launch(Kernel kernel, float* out, const float* in, int n, dim3 grid, dim3 block, int cluster = 1,
                   size_t shared_bytes = 0) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, out, in, n);
}

}  // namespace probe
