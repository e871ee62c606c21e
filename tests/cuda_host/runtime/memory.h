// The memory that a kernel may touch: the registered tensors, the shared variables of its module, its own stack.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "races.h"

namespace cuda_host {

// input: read only. output: every element must be written, none read before. scratch: none read before it is written.
// updated: read and written.
enum class Role { input, output, scratch, updated };

// `rows` rows of `row_bytes`, `stride` bytes from one to the next; what lies between two rows is out of bounds.
struct Buffer {
  std::string name;
  Role role;
  uintptr_t begin;
  size_t rows, row_bytes, stride, element_bytes;
  Cells cells;  // none for an input

  uintptr_t end() const { return begin + (rows - 1) * stride + row_bytes; }
  bool overlaps(uintptr_t first, uintptr_t last) const { return first < end() && last > begin; }
  bool holds(uintptr_t first, uintptr_t last) const {
    if (first < begin || last > end()) return false;
    return stride == row_bytes || (first - begin) % stride + (last - first) <= row_bytes;
  }
  std::string locate(uintptr_t address) const;  // "out[3, 17]"
};

class GlobalMemory {
 public:
  void add(Buffer buffer);
  void clear() { buffers_.clear(), kernels_.clear(); }
  void launched(const std::string& kernel) { kernels_ += (kernels_.empty() ? "kernel " : ", kernel ") + kernel; }
  const std::string& kernels() const { return kernels_; }
  // Throws Violation if an element of an output was never written.
  void check_written() const;

  // The buffer that holds all of [first, last), or null.
  Buffer* find(uintptr_t first, uintptr_t last);
  // Where the address is, for a message: "at out[3, 17]", "12 bytes after `out`", ...
  std::string locate(uintptr_t first, uintptr_t last) const;

 private:
  std::vector<Buffer> buffers_;
  std::string kernels_;  // launched since the last clear
  size_t last_ = 0;
};

struct SharedVariable {
  std::string name;
  size_t offset, size;  // in the module's thread-local block
  bool dynamic;         // its size is what the launch asks for
};

// A `__shared__` variable is a thread-local one. The one copy of them that kernels address is live for one block at a
// time; the copies of the other blocks in its cluster lie in homes, where those blocks' distributed accesses go.
class SharedMemory {
 public:
  static constexpr size_t kOutside = size_t(-1);

  void declare(std::vector<SharedVariable> variables);
  void forget_accesses() { cells_.clear(); }
  void begin_launch(uintptr_t live, uint32_t blocks, size_t dynamic_bytes);
  void make_live(uint32_t rank);
  uint32_t live_rank() const { return rank_; }

  // The offset of an address in the live copy or a home, and the block that it belongs to.
  size_t offset(uintptr_t address, uint32_t& rank) const;
  uintptr_t address(size_t offset, uint32_t rank) const;
  // The variable that holds all of `size` bytes at the offset, or null; marks it as used.
  SharedVariable* use(size_t offset, size_t size);
  Cell* cells(uint32_t rank, size_t offset) { return cells_[rank].data() + offset; }
  std::string locate(size_t offset) const;  // "at shared `partials`+12 of 128 bytes"
  size_t static_bytes_used() const;

 private:
  struct alignas(1024) Line { unsigned char bytes[1024]; };  // keeps in a home the alignment that a variable has
  uintptr_t home(uint32_t rank) const { return reinterpret_cast<uintptr_t>(homes_.data()) + rank * extent_; }
  size_t size(const SharedVariable& variable) const { return variable.dynamic ? dynamic_bytes_ : variable.size; }

  std::vector<SharedVariable> variables_;  // by offset
  std::vector<bool> used_;
  size_t extent_ = 0, dynamic_bytes_ = 0;  // extent_: whole lines
  uintptr_t live_ = 0;
  uint32_t rank_ = 0, blocks_ = 0;
  std::vector<Line> homes_;
  std::vector<Cells> cells_;
  size_t last_ = 0;
};

// A shared library with kernels.
struct Module {
  std::string path;
  uintptr_t begin = 0, end = 0;  // of its image
  size_t tls_module = 0;
  uintptr_t shared_block = 0;  // where its shared variables lie, if that is not in its thread-local block
  SharedMemory shared;
  std::map<uintptr_t, int> bounds;  // by a kernel's offset: the threads of its __launch_bounds__
};

// What the build found in a library beside its code.
struct Declaration {
  std::vector<SharedVariable> shared;
  std::map<uintptr_t, int> bounds;
};
void declare(const std::string& path, Declaration declaration);

// Where a library that is loaded begins.
uintptr_t begin_of(const std::string& path);
// The module whose code holds the address.
Module& module_of(const void* code);
void forget_shared_accesses();  // of every module
// Where the module's shared variables lie for kernels that this thread launches.
uintptr_t shared_block(const Module& module);

extern GlobalMemory global_memory;

}  // namespace cuda_host
