// Thread blocks and clusters as groups.
#pragma once

#include "cuda_host/executor.h"
#include "cuda_host/intrinsics.h"

namespace cooperative_groups {

class thread_block {
 public:
  static void sync(cuda_host::Site site = cuda_host::here()) { __syncthreads(site); }
  static unsigned thread_rank() {
    const uint3 index = cuda_host::thread_index();
    const dim3 extent = cuda_host::block_extent();
    return index.x + extent.x * (index.y + extent.y * index.z);
  }
  static unsigned num_threads() {
    const dim3 extent = cuda_host::block_extent();
    return extent.x * extent.y * extent.z;
  }
};
inline thread_block this_thread_block() { return {}; }

class cluster_group {
 public:
  static void barrier_arrive(cuda_host::Site site = cuda_host::here()) { cuda_host::arrive_cluster(site); }
  static void barrier_wait(cuda_host::Site site = cuda_host::here()) { cuda_host::wait_cluster(site); }
  static void sync(cuda_host::Site site = cuda_host::here()) {
    cuda_host::arrive_cluster(site);
    cuda_host::wait_cluster(site);
  }
  static unsigned block_rank() { return cuda_host::cluster_rank(); }
  static unsigned num_blocks() {
    const dim3 extent = cuda_host::cluster_extent();
    return extent.x * extent.y * extent.z;
  }
  template <class T>
  static T* map_shared_rank(T* address, unsigned rank, cuda_host::Site site = cuda_host::here()) {
    return static_cast<T*>(cuda_host::map_shared(address, rank, site));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
