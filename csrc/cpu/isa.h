// Which instruction set the CPU kernels run on: detected once, overridable downwards with BIGMODEL_ISA.
#pragma once

#include <string>
#include <vector>

// The namespaces that csrc/cpu/*.isa.cpp is compiled into, the plainest first; cmake/cpu.cmake has their flags.
#if defined(__x86_64__)
#define BIGMODEL_FOR_EACH_ISA(X) X(v2) X(v3) X(v4)
#else
#define BIGMODEL_FOR_EACH_ISA(X) X(neon)
#endif

namespace bigmodel::cpu {

std::vector<std::string> isas_built();
std::vector<std::string> isas_usable();  // built, and this processor has them; the best last
std::string isa_chosen();
void choose_isa(const std::string& name);  // throws std::invalid_argument naming the usable ones

// Index of the chosen instruction set in isas_built(): the first index of every op's ISA x dtype table.
int isa_index();

}  // namespace bigmodel::cpu
