#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace cuda_host {

// A check that failed. Addresses of code are written as {code:path:0x1f} for executor.py, which names them.
struct Violation : std::runtime_error { using std::runtime_error::runtime_error; };

std::string code(const std::string& path, uintptr_t offset);
std::string hex(uintptr_t value);

}  // namespace cuda_host
