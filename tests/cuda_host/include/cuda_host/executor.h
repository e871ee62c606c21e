// What the CUDA names of this directory's headers call: the executor that runs a grid on the CPU, one fibre per
// thread. Everything here is compiled without instrumentation, so none of it shows up as an access of the kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector_types.h"

namespace cuda_host {

struct Site {
  const char* file;
  int line;
};

// As a default argument it names the line that calls the function.
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

// --- where a thread is: constant during a thread's life, so the compiler may keep them -------------------------------
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_extent();
[[gnu::const]] dim3 grid_extent();
[[gnu::const]] unsigned lane_index();
[[gnu::const]] unsigned cluster_rank();
[[gnu::const]] dim3 cluster_extent();

// --- where threads meet ----------------------------------------------------------------------------------------------
enum class Vote { none, count, all, any };
int sync_block(Vote vote, int predicate, Site site);
void arrive_cluster(Site site);
void wait_cluster(Site site);

// The lanes of `mask` meet; each gives a value. Only `sync` orders their memory accesses.
enum class WarpOperation { sync, shuffle, ballot, add, min, max, min_signed, max_signed, bit_and, bit_or, bit_xor };
uint64_t meet_warp(WarpOperation operation, const char* name, unsigned mask, uint64_t value, unsigned source,
                   Site site);

// The address at which the block of that rank in the cluster keeps the shared variable behind `address`.
void* map_shared(const void* address, unsigned rank, Site site);

// cp.async: a copy is issued, committed with others as a group, and has landed once its group is waited for.
void copy_async(void* to_shared, const void* from_global, size_t bytes);
void commit_copies();
void wait_copies(size_t groups_left);

[[noreturn]] void trap(const char* what, Site site);

// --- launching -------------------------------------------------------------------------------------------------------
struct LaunchShape {
  dim3 grid, block, cluster;
  size_t dynamic_shared_bytes;
};
using KernelCall = void (*)(const void* kernel, const void* arguments);
void launch(const LaunchShape& shape, const void* kernel, KernelCall call, const void* arguments,
            size_t arguments_bytes);

// --- the devices that are pretended, by ordinal ----------------------------------------------------------------------
struct Device {
  const char* name;
  int major, minor;
  int multiprocessors;
  int shared_bytes_per_block;  // static and dynamic, the latter by cudaFuncAttributeMaxDynamicSharedMemorySize
  int shared_bytes_per_multiprocessor;
  int cluster_blocks;  // 1: no clusters
  int cluster_blocks_nonportable;
  int threads_per_multiprocessor;
  int blocks_per_multiprocessor;
  int shared_bytes_reserved;  // taken by the system for every resident block
};
constexpr int kSharedBytesPerBlock = 48 * 1024;  // without that attribute
constexpr int kThreadsPerBlock = 1024;
int device_count();
const Device& device(int index);
int current_device();
bool set_current_device(int index);  // makes its context and makes that current; false: there is no such device
int current_context();               // of the calling thread: a device's, or -1
void set_current_context(int index);

struct KernelAttributes {
  size_t dynamic_shared_bytes = kSharedBytesPerBlock;
  bool nonportable_cluster = false;
};
KernelAttributes& attributes(const void* kernel);            // on the current device
bool ask_for_dynamic_shared(const void* kernel, int bytes);  // false: more than the device has

}  // namespace cuda_host
