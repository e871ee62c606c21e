// PTX, which nvcc makes of a source and ptxas of PTX: executed here instruction by instruction, a thread in a fibre as
// the C++ kernels are. Names and meanings are those of NVIDIA's "PTX ISA" 9.0; what the kernels' PTX does not use is
// not known here, and refused when the text is read.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"

namespace cuda_host::ptx {

struct Frame;
struct Function;
struct Instruction;
using Execute = void (*)(Frame&, const Instruction&);

constexpr uint32_t kTrue = 0;  // a register that always holds 1

// What an opcode does, and how many registers its operands may have, each choice a word: "11" a destination and a
// source, "41" a vector of four and an address.
struct Operation {
  Execute execute;
  const char* shapes;
};

// Addresses in shared memory have 32 bits and begin at 0, generic and global ones are the host's.
enum class Space { none, generic, global, shared };

// Every operand is a register: immediates and addresses lie in registers of their own from the start.
struct Instruction {
  Execute execute = nullptr;
  std::array<uint32_t, 6> registers{};  // destinations, then sources
  uint32_t guard = kTrue;               // executed where that register is `expected`
  bool expected = true;
  Space space = Space::none;  // of a load or store
  uint32_t count = 0;         // of the registers
  uint32_t elements = 1;      // of the vector that is loaded or stored, or of the first operand
  int64_t offset = 0;         // added to an address
  uint32_t target = 0;        // of a branch: an instruction; of a call: one of Function::calls
  uint32_t line = 0;          // of the text
};

struct Call {
  const Function* callee;
  std::vector<uint32_t> results, arguments;  // registers of the caller
};

struct Function {
  uint32_t registers = 0;                                    // how many
  std::vector<uint64_t> start;                               // what the first of them hold
  std::vector<std::pair<uint32_t, uint64_t (*)()>> special;  // registers that differ by thread
  std::vector<std::pair<uint32_t, size_t>> arguments;        // of a kernel: registers with the address of that byte
  std::vector<uint32_t> parameters, results;                 // of another function: its registers
  size_t argument_bytes = 0;
  int max_threads = 1024;  // .maxntid
  std::vector<Instruction> code;
  std::vector<Call> calls;
};

// The function whose instructions run, and its registers.
struct Frame {
  const Function& function;
  uint64_t* registers;
  const Instruction* next;

  template <class T>
  T get(uint32_t i) const {
    T value;
    std::memcpy(&value, &registers[i], sizeof value);
    return value;
  }
  template <class T>
  void set(uint32_t i, T value) {
    std::memcpy(&registers[i], &value, sizeof value);
  }
};

// One file of PTX. `module` is what checks and reports know it by: a byte of its image stands for each line of the
// text, and the constants come after.
struct Program {
  static constexpr size_t kDynamicOffset = 64 * 1024;        // above the static shared variables of all kernels
  static constexpr size_t kDynamicSharedBytes = 228 * 1024;  // more than any device gives to one block
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  Module module;
  std::vector<unsigned char> image;
  std::unique_ptr<void, Free> shared{std::aligned_alloc(1024, kDynamicOffset + kDynamicSharedBytes)};
  std::map<std::string, std::unique_ptr<Function>> functions;

  Program(const std::string& path, const std::string& text);
  Program(const Program&) = delete;
};

// The instruction of an opcode, ready but for its operands; throws Violation where the opcode, or operands of that
// shape, are not known.
Instruction instruction(const std::string& opcode, const std::string& shape);
// Opcodes that only read and write registers.
const std::map<std::string, Operation>& arithmetic();

// Gives registers that a function needs their numbers: those that a thread starts with, of `constants`, come first,
// then the others in the order in which they occur. There are `count` of them before.
void number_registers(Function& function, uint32_t count, const std::map<uint64_t, uint32_t>& constants);

// What the running thread of a kernel does, which is a Function: a KernelCall.
void run(const void* kernel, const void* arguments);

// By the address of a C++ kernel, the entry of the PTX at `path` that is executed in its place on devices of one
// architecture (75, 80, 90) while `execute` is set.
void declare(int arch, const std::string& path, const std::map<uintptr_t, std::string>& kernels);
void forget_shared_accesses();  // of every program
extern bool execute;
struct Kernel {
  Program* program;
  const Function* function;
};
const Kernel* find(const void* kernel, int arch);  // null where none was declared

}  // namespace cuda_host::ptx
