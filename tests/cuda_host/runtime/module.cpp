// Finds the image and the thread-local block of the shared library that a kernel lives in.
#include <dlfcn.h>
#include <link.h>

#include <climits>
#include <cstdlib>
#include <map>

#include "memory.h"
#include "report.h"

extern "C" void* __tls_get_addr(size_t*);  // of {module, offset}; allocates the block on its first use in a thread

namespace cuda_host {
namespace {

std::map<uintptr_t, Module> modules;
std::map<std::string, Declaration> declared;

std::string real_path(const std::string& path) {
  char buffer[PATH_MAX];
  return realpath(path.c_str(), buffer) ? buffer : path;
}

int visit(dl_phdr_info* info, size_t, void* data) {
  auto& module = *static_cast<Module*>(data);
  if (info->dlpi_addr != module.begin) return 0;
  module.tls_module = info->dlpi_tls_modid;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    module.end = std::max<uintptr_t>(module.end, module.begin + segment.p_vaddr + segment.p_memsz);
  }
  return 1;
}

}  // namespace

void declare(const std::string& path, Declaration declaration) { declared[real_path(path)] = std::move(declaration); }

uintptr_t begin_of(const std::string& path) {
  std::pair<std::string, uintptr_t> wanted{real_path(path), 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& [path, begin] = *static_cast<std::pair<std::string, uintptr_t>*>(data);
        if (real_path(info->dlpi_name) != path) return 0;
        begin = info->dlpi_addr;
        return 1;
      },
      &wanted);
  return wanted.second;
}

Module& module_of(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) throw Violation("a kernel at an address that is in no module");
  const auto begin = reinterpret_cast<uintptr_t>(info.dli_fbase);
  const auto found = modules.find(begin);
  if (found != modules.end()) return found->second;
  Module& module = modules[begin];
  module.path = real_path(info.dli_fname);
  module.begin = begin;
  dl_iterate_phdr(visit, &module);
  module.shared.declare(declared[module.path].shared);
  module.bounds = declared[module.path].bounds;
  return module;
}

void forget_shared_accesses() {
  for (auto& [begin, module] : modules) module.shared.forget_accesses();
}

uintptr_t shared_block(const Module& module) {
  if (module.shared_block) return module.shared_block;
  if (!module.tls_module) return 0;
  size_t index[2] = {module.tls_module, 0};
  return reinterpret_cast<uintptr_t>(__tls_get_addr(index));
}

}  // namespace cuda_host
