// What bind.cpp may ask of the CUDA runtime; no CUDA header is needed to include this.
#pragma once

namespace bigmodel::cuda {

int runtime_version();  // as CUDA encodes it: 13000 for 13.0
int driver_version();   // 0 without a driver
int device_count();     // 0 without a driver or a device

}  // namespace bigmodel::cuda
