#include "access.h"

#include <cstring>

#include "grid.h"
#include "memory.h"
#include "report.h"

namespace cuda_host {

Races races;
Traffic traffic;

namespace {

struct Attempt {
  uintptr_t address;
  size_t bytes;
  bool write;
  uint32_t pc;  // within the instruction, so that the line found for it is its own

  std::string text(const std::string& place) const {
    return name(*current) + (write ? " writes " : " reads ") + std::to_string(bytes) + " bytes " + place + " (" +
           hex(address) + ", " + code(grid->module->path, pc) + ")";
  }
};

Attempt attempt_at(uintptr_t address, size_t bytes, bool write, const void* code) {
  return {address, bytes, write, uint32_t(reinterpret_cast<uintptr_t>(code) - grid->module->begin - 1)};
}

// `place` gives the text, which costs more than the check.
template <class Place>
void check_race(const Attempt& attempt, const char* kind, Cell* cells, uint32_t floor, const Place& place) {
  const Conflict conflict = attempt.write ? races.write(cells, attempt.bytes, *current, attempt.pc, floor)
                                          : races.read(cells, attempt.bytes, *current, attempt.pc, floor);
  if (!conflict) return;
  if (races.segment(conflict.earlier.segment).in_flight) {
    fail("asynchronous copy not waited for: " + attempt.text(place()) + ", where one that " +
         name_of_segment(conflict.earlier.segment) + " issued (" + code(grid->module->path, conflict.earlier.pc) +
         (conflict.wrote ? ") goes" : ") comes from"));
  }
  fail(std::string("data race on ") + kind + " memory: " + attempt.text(place()) + ", which " +
       name_of_segment(conflict.earlier.segment) + (conflict.wrote ? " wrote (" : " read (") +
       code(grid->module->path, conflict.earlier.pc) + ") with no barrier between");
}

// Perhaps another thread's write is still to come: then it is a race, and that is what is reported.
void suspect(const Attempt& attempt, const std::string& place, const char* who) {
  if (!grid->suspicion.empty()) return;
  grid->suspicion = "uninitialised read: " + attempt.text(place) + ", which " + who + " has written";
}

void check_shared(const Attempt& attempt, size_t offset, uint32_t rank) {
  SharedMemory& shared = grid->module->shared;
  Block& block = *current->block;
  if (!shared.use(offset, attempt.bytes)) {
    fail("access outside shared memory: " + attempt.text(shared.locate(offset)));
  }
  if (rank != block.rank) {
    const Block& owner = block.cluster->blocks[rank];
    const std::string whose = " of block " + name(owner.index);
    if (owner.finished()) {
      fail("distributed shared memory of a block that has exited: " + attempt.text(shared.locate(offset) + whose));
    }
    if (current->clock.cluster_waits == 0) {
      fail("distributed shared memory before the first cluster barrier, so of a block that may not have started: " +
           attempt.text(shared.locate(offset) + whose));
    }
  }
  Cell* cells = shared.cells(rank, offset);
  const uint32_t floor = block.cluster->first_segment;
  for (size_t i = 0; !attempt.write && i < attempt.bytes; ++i) {
    if (cells[i].write.segment < floor) suspect(attempt, shared.locate(offset), "no thread of the block");
  }
  check_race(attempt, "shared", cells, floor, [&] { return shared.locate(offset); });
}

void check_global(const Attempt& attempt, Buffer& buffer) {
  if (buffer.role == Role::input) {
    if (attempt.write) fail("write to an input: " + attempt.text("at " + buffer.locate(attempt.address)));
    return;
  }
  Cell* cells = buffer.cells.data() + (attempt.address - buffer.begin);
  const bool needs_write = !attempt.write && buffer.role != Role::updated;
  for (size_t i = 0; needs_write && i < attempt.bytes; ++i) {
    if (!cells[i].write.segment) suspect(attempt, "at " + buffer.locate(attempt.address), "no kernel");
  }
  check_race(attempt, "global", cells, grid->first_segment, [&] { return "at " + buffer.locate(attempt.address); });
}

}  // namespace

void check_access(uintptr_t address, size_t bytes, bool write, bool aligned, const void* code) {
  Thread* thread = current;
  if (!thread || bytes == 0 || (address >= thread->stack_low && address + bytes <= thread->stack_high)) return;
  const Module& module = *grid->module;
  const Attempt attempt = attempt_at(address, bytes, write, code);
  uint32_t rank;
  const size_t offset = module.shared.offset(address, rank);
  if (aligned && address % bytes) {
    const bool shared = offset != SharedMemory::kOutside;
    fail("misaligned access: " +
         attempt.text(shared ? module.shared.locate(offset) : global_memory.locate(address, address + bytes)));
  }
  for (const Copy& copy : thread->copies) {
    if (address < copy.to + copy.bytes && copy.to < address + bytes) {
      fail("asynchronous copy not waited for: " + attempt.text("where it goes"));
    }
  }
  const TrafficKey key{grid->kernel, &module, attempt.pc, offset != SharedMemory::kOutside, write, uint32_t(bytes)};
  if (key.shared) {
    check_shared(attempt, offset, rank);
    if (rank == thread->block->rank) thread->warp->traffic.note(thread->lane, key, address);
    return;
  }
  if (Buffer* buffer = global_memory.find(address, address + bytes)) {
    check_global(attempt, *buffer);
    thread->warp->traffic.note(thread->lane, key, address);
    return;
  }
  const bool constant = (address >= grid->arguments && address + bytes <= grid->arguments_end) ||
                        (address >= module.begin && address + bytes <= module.end);
  if (!constant || write) {
    fail("access outside the tensors passed in: " + attempt.text(global_memory.locate(address, address + bytes)));
  }
}

void copy_async(void* to_shared, const void* from_global, size_t bytes) {
  copy_async(reinterpret_cast<uintptr_t>(to_shared), reinterpret_cast<uintptr_t>(from_global), bytes,
             __builtin_return_address(0));
}

void copy_async(uintptr_t to, uintptr_t from, size_t bytes, const void* code) {
  Races::begin_copy(*current);
  check_access(from, bytes, false, true, code);
  check_access(to, bytes, true, true, code);
  uint32_t rank;
  if (grid->module->shared.offset(to, rank) == SharedMemory::kOutside) {
    fail(name(*current) + " copies asynchronously to an address that is not in shared memory (" + hex(to) + ")");
  }
  current->copies.push_back({to, from, bytes, current->committed_groups, races.end_copy(*current)});
}

void commit_copies() { ++current->committed_groups; }

void wait_copies(size_t groups_left) {
  std::vector<Copy> pending;
  for (const Copy& copy : current->copies) {
    if (copy.group + groups_left >= current->committed_groups) {
      pending.push_back(copy);
      continue;
    }
    std::memcpy(reinterpret_cast<void*>(copy.to), reinterpret_cast<const void*>(copy.from), copy.bytes);
    races.land(copy.segment, *current);
  }
  current->copies = std::move(pending);
}

}  // namespace cuda_host
