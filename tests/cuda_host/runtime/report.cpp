#include "report.h"

#include <cstdio>

namespace cuda_host {

std::string hex(uintptr_t value) {
  char buffer[24];
  std::snprintf(buffer, sizeof buffer, "0x%zx", value);
  return buffer;
}

std::string code(const std::string& path, uintptr_t offset) { return "{code:" + path + ":" + hex(offset) + "}"; }

}  // namespace cuda_host
