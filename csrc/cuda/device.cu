// What the machine has, and the words for what it lacks.
#include <stdexcept>
#include <string>
#include <vector>

#include "common.cuh"
#include "device.h"

namespace bigmodel::cuda {
namespace {

// CUDA encodes 13.0 as 13000.
std::string version(int code) { return std::to_string(code / 1000) + "." + std::to_string(code % 1000 / 10); }

int attribute(int index, cudaDeviceAttr which) {
  int value = 0;
  check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, which, index));
  return value;
}

std::string what_is_missing(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice: {
      const int major = runtime_version() / 1000;
      const std::string needed =
          "needed is one for CUDA " + std::to_string(major) + (major >= 13 ? " (580 or newer)" : "");
      if (driver_version() == 0) return ": this machine has no NVIDIA driver, " + needed;
      if (error == cudaErrorNoDevice) return "";
      return ": the driver is for CUDA " + version(driver_version()) + ", " + needed;
    }
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: {
      int index = 0, major = 0, minor = 0;
      cudaGetDevice(&index);
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
      return ": device " + std::to_string(index) + " is sm_" + std::to_string(major) + std::to_string(minor) +
             ", this build covers " BIGMODEL_CUDA_ARCHITECTURES;
    }
    default: return "";
  }
}

// The context of the calling thread, which torch's copy of the runtime shares with this one: cuCtxGetCurrent and
// cuCtxSetCurrent of the driver, since the runtime itself cannot leave a thread without one.
struct Contexts {
  int (*get)(void** context) = nullptr;
  int (*set)(void* context) = nullptr;
};

void* driver_function(const char* op, const char* name) {
  constexpr unsigned kVersion = 12000;  // of the interface; both are older
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  check(op, cudaGetDriverEntryPointByVersion(name, &function, kVersion, cudaEnableDefault, &result));
  if (!function) fail(op, cudaErrorSymbolNotFound);
  return function;
}

const Contexts& contexts(const char* op) {
  static const Contexts found{reinterpret_cast<int (*)(void**)>(driver_function(op, "cuCtxGetCurrent")),
                              reinterpret_cast<int (*)(void*)>(driver_function(op, "cuCtxSetCurrent"))};
  return found;
}

}  // namespace

int runtime_version() {
  int code = 0;
  return cudaRuntimeGetVersion(&code) == cudaSuccess ? code : 0;
}

int driver_version() {
  int code = 0;
  return cudaDriverGetVersion(&code) == cudaSuccess ? code : 0;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // clears it
  return 0;
}

const Device& device(const char* op, int index) {
  static const std::vector<Device> devices = [] {
    std::vector<Device> found(device_count());
    for (int i = 0; i < int(found.size()); ++i)
      found[i] = {attribute(i, cudaDevAttrMultiProcessorCount),
                  attribute(i, cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticSharedBytes,
                  attribute(i, cudaDevAttrClusterLaunch) != 0};
    return found;
  }();
  if (index >= 0 && index < int(devices.size())) return devices[index];
  int count = 0;
  check(op, cudaGetDeviceCount(&count));
  fail(op, cudaErrorInvalidDevice);
}

const Device& current_device(const char* op) {
  int index = 0;
  check(op, cudaGetDevice(&index));
  return device(op, index);
}

DeviceGuard::DeviceGuard(const char* op, int index) {
  int current = -1;
  contexts(op).get(&previous_);  // fails before the driver's first use, when there is none
  if (previous_) check(op, cudaGetDevice(&current));
  if (current == index) return;
  check(op, cudaSetDevice(index));
  moved_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (moved_) contexts("").set(previous_);
}

void fail(const char* op, cudaError_t error) {
  cudaGetLastError();  // a launch that failed must not be reported again by the next call
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error) + what_is_missing(error));
}

}  // namespace bigmodel::cuda
