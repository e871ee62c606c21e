#include "memory.h"

#include <algorithm>
#include <cstring>

#include "report.h"

namespace cuda_host {

GlobalMemory global_memory;

std::string Buffer::locate(uintptr_t address) const {
  const size_t offset = address - begin;
  const std::string row = rows > 1 ? std::to_string(offset / stride) + ", " : "";
  return name + "[" + row + std::to_string((rows > 1 ? offset % stride : offset) / element_bytes) + "]";
}

void GlobalMemory::add(Buffer buffer) {
  if (buffer.rows == 0 || buffer.row_bytes == 0) return;
  if (buffer.rows == 1 || buffer.stride < buffer.row_bytes) {  // rows that overlap, as an expanded tensor's do
    buffer.row_bytes += (buffer.rows - 1) * buffer.stride;
    buffer.rows = 1;
    buffer.stride = buffer.row_bytes;
  }
  if (buffer.role != Role::input) buffer.cells.resize(buffer.end() - buffer.begin);
  buffers_.push_back(std::move(buffer));
}

void GlobalMemory::check_written() const {
  for (const Buffer& buffer : buffers_) {
    if (buffer.role != Role::output) continue;
    for (size_t row = 0; row < buffer.rows; ++row) {
      const Cell* cells = buffer.cells.data() + row * buffer.stride;
      for (size_t i = 0; i < buffer.row_bytes; ++i) {
        if (cells[i].write.segment) continue;
        throw Violation("output never written: " + buffer.locate(buffer.begin + row * buffer.stride + i) + " by " +
                        (kernels_.empty() ? "any kernel" : kernels_));
      }
    }
  }
}

Buffer* GlobalMemory::find(uintptr_t first, uintptr_t last) {
  if (last_ < buffers_.size() && buffers_[last_].holds(first, last)) return &buffers_[last_];
  for (size_t i = 0; i < buffers_.size(); ++i) {
    if (!buffers_[i].holds(first, last)) continue;
    last_ = i;
    return &buffers_[i];
  }
  return nullptr;
}

std::string GlobalMemory::locate(uintptr_t first, uintptr_t last) const {
  const Buffer* nearest = nullptr;
  uintptr_t least = UINTPTR_MAX;
  for (const Buffer& buffer : buffers_) {
    if (buffer.holds(first, last)) return "at " + buffer.locate(first);
    if (buffer.overlaps(first, last)) {
      return first < buffer.begin || last > buffer.end() ? "across the end of `" + buffer.name + "`"
                                                         : "past the end of a row, at " + buffer.locate(first);
    }
    const uintptr_t away = first >= buffer.end() ? first - buffer.end() : buffer.begin - last;
    if (away < least) least = away, nearest = &buffer;
  }
  if (!nearest) return "where no tensor was passed in";
  const std::string away = least ? std::to_string(least) + " bytes " : "right ";
  return away + (first >= nearest->end() ? "after" : "before") + " `" + nearest->name + "`";
}

void SharedMemory::declare(std::vector<SharedVariable> variables) {
  std::sort(variables.begin(), variables.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
  variables_ = std::move(variables);
  const size_t bytes = variables_.empty() ? 0 : variables_.back().offset + variables_.back().size;
  extent_ = (bytes + sizeof(Line) - 1) / sizeof(Line) * sizeof(Line);
  homes_.clear();
  cells_.clear();
}

void SharedMemory::begin_launch(uintptr_t live, uint32_t blocks, size_t dynamic_bytes) {
  live_ = live;
  rank_ = 0;
  blocks_ = blocks;
  dynamic_bytes_ = dynamic_bytes;
  used_.assign(variables_.size(), false);
  if (cells_.size() >= blocks) return;
  homes_.resize(blocks * extent_ / sizeof(Line));
  cells_.resize(blocks);
  for (Cells& cells : cells_) {
    if (cells.size() == 0) cells.resize(extent_);
  }
}

void SharedMemory::make_live(uint32_t rank) {
  if (rank == rank_) return;
  for (size_t i = 0; i < variables_.size(); ++i) {
    if (!used_[i]) continue;
    const auto at = [&](uintptr_t copy) { return reinterpret_cast<void*>(copy + variables_[i].offset); };
    std::memcpy(at(home(rank_)), at(live_), size(variables_[i]));
    std::memcpy(at(live_), at(home(rank)), size(variables_[i]));
  }
  rank_ = rank;
}

size_t SharedMemory::offset(uintptr_t address, uint32_t& rank) const {
  rank = rank_;
  if (address - live_ < extent_) return address - live_;
  const uintptr_t offset = address - home(0);
  if (offset >= blocks_ * extent_) return kOutside;
  rank = uint32_t(offset / extent_);
  return offset % extent_;
}

uintptr_t SharedMemory::address(size_t offset, uint32_t rank) const {
  return (rank == rank_ ? live_ : home(rank)) + offset;
}

SharedVariable* SharedMemory::use(size_t offset, size_t bytes) {
  const auto holds = [&](size_t i) {
    return i < variables_.size() && offset >= variables_[i].offset &&
           offset + bytes <= variables_[i].offset + size(variables_[i]);
  };
  if (!holds(last_)) {
    const auto above = std::upper_bound(variables_.begin(), variables_.end(), offset,
                                        [](size_t value, const SharedVariable& v) { return value < v.offset; });
    if (above == variables_.begin() || !holds(size_t(above - variables_.begin()) - 1)) return nullptr;
    last_ = size_t(above - variables_.begin()) - 1;
  }
  used_[last_] = true;
  return &variables_[last_];
}

std::string SharedMemory::locate(size_t offset) const {
  const SharedVariable* below = nullptr;
  for (const SharedVariable& variable : variables_) {
    if (variable.offset <= offset) below = &variable;
  }
  if (!below) return "before all shared variables";
  return "at shared `" + below->name + "`+" + std::to_string(offset - below->offset) + " of " +
         std::to_string(size(*below)) + " bytes";
}

size_t SharedMemory::static_bytes_used() const {
  size_t total = 0;
  for (size_t i = 0; i < variables_.size(); ++i) {
    if (used_[i] && !variables_[i].dynamic) total += variables_[i].size;
  }
  return total;
}

}  // namespace cuda_host
