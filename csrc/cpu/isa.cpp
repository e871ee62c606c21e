#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace bigmodel::cpu {
namespace {

bool has(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if __GNUC__ >= 12
  bool v2 = __builtin_cpu_supports("x86-64-v2"), v3 = __builtin_cpu_supports("x86-64-v3"),
       v4 = __builtin_cpu_supports("x86-64-v4");
#else
  bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
            __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt");
  bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl");
#endif
  return (isa == "v2" && v2) || (isa == "v3" && v3) || (isa == "v4" && v4);
#else
  return isa == "neon";
#endif
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

int index_of(const std::string& name) {
  for (const auto& usable : isas_usable())
    if (usable == name) {
      auto built = isas_built();
      for (size_t i = 0; i < built.size(); ++i)
        if (built[i] == name) return int(i);
    }
  throw std::invalid_argument("BIGMODEL_ISA: '" + name +
                              "' cannot be used on this processor; usable: " + join(isas_usable()) + ".");
}

int first_choice() {
  if (const char* forced = std::getenv("BIGMODEL_ISA"); forced && *forced) return index_of(forced);
  auto usable = isas_usable();
  if (usable.empty())
    throw std::runtime_error("bigmodel needs one of the instruction sets " + join(isas_built()) +
                             ", and this processor has none of them.");
  return index_of(usable.back());
}

std::atomic<int>& chosen() {
  static std::atomic<int> index{first_choice()};
  return index;
}

}  // namespace

std::vector<std::string> isas_built() {
#define BIGMODEL_NAME(isa, ...) #isa,
  return {BIGMODEL_FOR_EACH_ISA(BIGMODEL_NAME, )};
}

std::vector<std::string> isas_usable() {
  std::vector<std::string> usable;
  for (const auto& name : isas_built())
    if (has(name)) usable.push_back(name);
  return usable;
}

int isa_index() { return chosen().load(std::memory_order_relaxed); }

std::string isa_chosen() { return isas_built()[isa_index()]; }

void choose_isa(const std::string& name) { chosen() = index_of(name); }

}  // namespace bigmodel::cpu
