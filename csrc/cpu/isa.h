// Which instruction set the CPU kernels run on: detected once, overridable downwards with BIGMODEL_ISA.
#pragma once

#include <string>
#include <vector>

// X(isa, ...) for the namespaces that csrc/cpu/*.isa.cpp is compiled into, the plainest first; cmake/cpu.cmake has
// their flags.
#if defined(__x86_64__)
#define BIGMODEL_FOR_EACH_ISA(X, ...) X(v2, __VA_ARGS__) X(v3, __VA_ARGS__) X(v4, __VA_ARGS__)
#else
#define BIGMODEL_FOR_EACH_ISA(X, ...) X(neon, __VA_ARGS__)
#endif

// Declares the table `name` in each of these namespaces, and here the function `name` that gives the chosen one's.
#define BIGMODEL_ISA_TABLE(Table, name)                                                              \
  BIGMODEL_FOR_EACH_ISA(BIGMODEL_ISA_DECLARE, Table, name)                                           \
  inline const Table& name() {                                                                       \
    static const Table* const tables[] = {BIGMODEL_FOR_EACH_ISA(BIGMODEL_ISA_ADDRESS, Table, name)}; \
    return *tables[isa_index()];                                                                     \
  }
#define BIGMODEL_ISA_DECLARE(isa, Table, name) \
  namespace isa {                              \
  extern const Table name;                     \
  }
#define BIGMODEL_ISA_ADDRESS(isa, Table, name) &isa::name,

namespace bigmodel::cpu {

std::vector<std::string> isas_built();
std::vector<std::string> isas_usable();  // built, and this processor has them; the best last
std::string isa_chosen();
void choose_isa(const std::string& name);  // throws std::invalid_argument naming the usable ones

// Index of the chosen instruction set in isas_built(): the first index of every op's ISA x dtype table.
int isa_index();

}  // namespace bigmodel::cpu
