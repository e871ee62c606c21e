// Launches: what a device of the chosen kind would refuse is refused here.
#include <iterator>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "access.h"
#include "grid.h"
#include "memory.h"
#include "ptx.h"
#include "report.h"

namespace cuda_host {
namespace {

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
constexpr Device kDevices[] = {
    {"sm_90 (H100)", 9, 0, 132, 227 * 1024, 228 * 1024, 8, 16, 2048, 32, 1024},
    {"sm_80 (A100)", 8, 0, 108, 163 * 1024, 164 * 1024, 1, 1, 2048, 32, 1024},
    {"sm_90 (H100 MIG 1g)", 9, 0, 16, 227 * 1024, 228 * 1024, 8, 16, 2048, 32, 1024},
    {"sm_75 (T4)", 7, 5, 40, 64 * 1024, 64 * 1024, 1, 1, 1024, 16, 0},
};
constexpr uint32_t kGridX = 2147483647, kGridYZ = 65535, kBlockXY = 1024, kBlockZ = 64;
constexpr size_t kArgumentBytes = 32764;  // from sm_70 and CUDA 12.1 on

thread_local int context = -1;        // of the calling thread: a device's, or -1
thread_local int chosen = 0;          // by the last cudaSetDevice: where a launch without a context goes
int context_before = -1;              // at begin_call, as the next two begin there
std::vector<bool> made, launched_on;  // by device: contexts, and whether kernels ran
std::map<std::pair<const void*, int>, KernelAttributes> attributes_of;  // by kernel and device, set in this call
std::map<std::pair<const void*, int>, size_t> dynamic_shared_asked;     // in any call
std::mutex one_launch;

std::string text(dim3 extent) {
  return std::to_string(extent.x) + " x " + std::to_string(extent.y) + " x " + std::to_string(extent.z);
}

std::string name_of_kernel(const void* kernel) {
  const Module& module = module_of(kernel);
  return code(module.path, reinterpret_cast<uintptr_t>(kernel) - module.begin);
}

std::string name_of_context(int index) { return index < 0 ? "no device" : "device " + std::to_string(index); }

void require(bool holds, const std::string& otherwise) {
  if (holds) return;
  throw Violation("launch beyond the limits of " + std::string(device(current_device()).name) + ": " + otherwise);
}

void check_shape(const LaunchShape& shape, const KernelAttributes& kernel, int bound, size_t arguments_bytes) {
  const auto [grid, block, cluster, dynamic_bytes] = shape;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool extents = block.x <= kBlockXY && block.y <= kBlockXY && block.z <= kBlockZ;
  require(extents && threads >= 1 && threads <= kThreadsPerBlock,
          "a block of " + text(block) + " threads; at most 1024 x 1024 x 64 and 1024 in all");
  require(threads <= uint64_t(bound),
          "a block of " + text(block) + " threads; this kernel's __launch_bounds__ allow " + std::to_string(bound));
  require(grid.x >= 1 && grid.y >= 1 && grid.z >= 1, "an empty grid of " + text(grid) + " blocks");
  require(grid.x <= kGridX && grid.y <= kGridYZ && grid.z <= kGridYZ,
          "a grid of " + text(grid) + " blocks; at most 2147483647 x 65535 x 65535");
  const uint64_t blocks = uint64_t(cluster.x) * cluster.y * cluster.z;
  const Device& gpu = device(current_device());
  const int most = kernel.nonportable_cluster ? gpu.cluster_blocks_nonportable : gpu.cluster_blocks;
  require(blocks >= 1 && blocks <= uint64_t(most),
          "a cluster of " + text(cluster) + " blocks; this kernel may have " + std::to_string(most));
  require(grid.x % cluster.x == 0 && grid.y % cluster.y == 0 && grid.z % cluster.z == 0,
          "a grid of " + text(grid) + " blocks that clusters of " + text(cluster) + " do not divide");
  require(dynamic_bytes <= kernel.dynamic_shared_bytes,
          std::to_string(dynamic_bytes) + " bytes of dynamic shared memory; this kernel may have " +
              std::to_string(kernel.dynamic_shared_bytes) + " (cudaFuncAttributeMaxDynamicSharedMemorySize)");
  require(arguments_bytes <= kArgumentBytes, std::to_string(arguments_bytes) + " bytes of arguments; at most 32764");
}

// Static shared memory is known once the kernel has run: it is what was touched.
void check_shared(const SharedMemory& shared, size_t dynamic_bytes) {
  const size_t fixed = shared.static_bytes_used();
  require(fixed <= kSharedBytesPerBlock, std::to_string(fixed) + " bytes of static shared memory; at most 49152");
  require(fixed + dynamic_bytes <= size_t(device(current_device()).shared_bytes_per_block),
          std::to_string(fixed) + " bytes of static and " + std::to_string(dynamic_bytes) +
              " of dynamic shared memory; at most " + std::to_string(device(current_device()).shared_bytes_per_block));
}

}  // namespace

int device_count() { return int(std::size(kDevices)); }

const Device& device(int index) { return kDevices[index]; }

int current_device() { return context < 0 ? chosen : context; }

bool set_current_device(int index) {
  if (index < 0 || index >= device_count()) return false;
  chosen = context = index;
  if (!made.empty()) made[size_t(index)] = true;
  return true;
}

int current_context() { return context; }

void set_current_context(int index) { context = index; }

void begin_call() {
  attributes_of.clear();
  made.assign(size_t(device_count()), false);
  launched_on = made;
  chosen = 0;
  context_before = context;
}

void end_call() {
  const int after = std::exchange(context, context_before);
  for (size_t i = 0; i < made.size(); ++i) {
    if (!made[i] || launched_on[i]) continue;
    throw Violation("context made in vain: device " + std::to_string(i) +
                    " was set current, and none of these ran there: " + global_memory.kernels());
  }
  if (after == context_before) return;
  throw Violation("device not given back: the calling thread has " + name_of_context(after) + " where it had " +
                  name_of_context(context_before) + ", after " + global_memory.kernels());
}

KernelAttributes& attributes(const void* kernel) { return attributes_of[{kernel, current_device()}]; }

bool ask_for_dynamic_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > device(current_device()).shared_bytes_per_block) return false;
  size_t& asked = dynamic_shared_asked[{kernel, current_device()}];
  if (asked && asked != size_t(bytes)) {
    throw Violation("kernel " + name_of_kernel(kernel) + ": asks for " + std::to_string(bytes) +
                    " bytes of dynamic shared memory where another call asked for " + std::to_string(asked) +
                    "; of two threads one may set the other's limit before its launch");
  }
  asked = size_t(bytes);
  attributes(kernel).dynamic_shared_bytes = asked;
  return true;
}

void launch(const LaunchShape& shape, const void* kernel, KernelCall call, const void* arguments,
            size_t arguments_bytes) {
  const std::lock_guard lock(one_launch);
  Module& host = module_of(kernel);
  const Device& gpu = device(current_device());
  const auto begin = reinterpret_cast<uintptr_t>(arguments);
  const std::string kernel_name = name_of_kernel(kernel);
  global_memory.launched(kernel_name);
  try {
    const ptx::Kernel* const ptx = ptx::execute ? ptx::find(kernel, 10 * gpu.major + gpu.minor) : nullptr;
    Module& module = ptx ? ptx->program->module : host;
    const auto found = host.bounds.find(reinterpret_cast<uintptr_t>(kernel) - host.begin);
    const int bound = found == host.bounds.end() ? kThreadsPerBlock : found->second;
    check_shape(shape, attributes(kernel), ptx ? ptx->function->max_threads : bound, arguments_bytes);
    if (ptx::execute && !ptx) throw Violation("no PTX of it was declared for " + std::string(gpu.name));
    if (ptx && ptx->function->argument_bytes != arguments_bytes) {
      throw Violation("the launch gives " + std::to_string(arguments_bytes) + " bytes of arguments, and the PTX has " +
                      std::to_string(ptx->function->argument_bytes));
    }
    const void* const code = ptx ? ptx->function : kernel;
    Grid grid{shape, kernel, ptx ? ptx::run : call, code, begin, begin + arguments_bytes, &module, {}, 0, {}, {}, {}};
    if (!launched_on.empty()) launched_on[size_t(current_device())] = true;
    run(grid);
    check_shared(module.shared, shape.dynamic_shared_bytes);
  } catch (const Violation& violation) {
    throw Violation("kernel " + kernel_name + ": " + violation.what());
  }
}

}  // namespace cuda_host
