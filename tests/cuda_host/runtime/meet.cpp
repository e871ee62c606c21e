// Where threads meet: block barriers, cluster barriers, warp operations.
#include <algorithm>

#include "access.h"
#include "grid.h"
#include "memory.h"
#include "report.h"

namespace cuda_host {
namespace {

// True for the last to arrive; the others are in `waiting` if they wait.
bool arrive(Barrier& barrier, const char* meeting, Site site) {
  if (barrier.arrived == 0) {
    barrier.first = site;
  } else if (barrier.first != site) {
    fail(name(*current) + " is in " + meeting + " at " + name(site) + ", other threads are in the one at " +
         name(barrier.first));
  }
  current->clock.segment = 0;
  if (++barrier.arrived < barrier.expected) return false;
  barrier.arrived = 0;
  ++barrier.phase;
  return true;
}

void open(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

// What `operation` gives to a lane of the meeting.
uint64_t result(WarpOperation operation, Thread* const* lanes, uint32_t mask, const uint64_t* values, uint32_t lane) {
  if (operation == WarpOperation::shuffle) return values[lanes[lane]->source];
  uint32_t total = 0;
  bool first = true;
  for (uint32_t i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const auto value = uint32_t(values[i]);
    if (operation == WarpOperation::ballot) {
      total |= uint32_t(value != 0) << i;
      continue;
    }
    if (first) {
      total = value;
      first = false;
      continue;
    }
    switch (operation) {
      case WarpOperation::add: total += value; break;
      case WarpOperation::min: total = std::min(total, value); break;
      case WarpOperation::max: total = std::max(total, value); break;
      case WarpOperation::min_signed: total = uint32_t(std::min(int32_t(total), int32_t(value))); break;
      case WarpOperation::max_signed: total = uint32_t(std::max(int32_t(total), int32_t(value))); break;
      case WarpOperation::bit_and: total &= value; break;
      case WarpOperation::bit_or: total |= value; break;
      default: total ^= value; break;
    }
  }
  return total;
}

void conclude(WarpOperation operation, const char* what, Thread* const* lanes, uint32_t mask) {
  if (operation == WarpOperation::sync) return Races::join(lanes, mask);
  uint64_t values[32] = {};
  for (uint32_t i = 0; i < 32; ++i) {
    if (mask >> i & 1) values[i] = lanes[i]->value;
  }
  uint64_t common = 0;
  if (operation != WarpOperation::shuffle) common = result(operation, lanes, mask, values, 0);
  for (uint32_t i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (operation == WarpOperation::shuffle && !(mask >> lanes[i]->source & 1)) {
      fail(name(*lanes[i]) + " reads lane " + std::to_string(lanes[i]->source) + " in " + what +
           ", which is not in mask " + hex(mask));
    }
    lanes[i]->value = operation == WarpOperation::shuffle ? values[lanes[i]->source] : common;
  }
}

}  // namespace

int sync_block(Vote vote, int predicate, Site site) {
  Thread& thread = *current;
  Block& block = *thread.block;
  ++thread.clock.block_arrivals;
  block.count += predicate != 0;
  if (arrive(block.barrier, "__syncthreads", site)) {
    block.last_count = block.count;
    block.count = 0;
    for (Warp& warp : block.warps) warp.traffic.flush(traffic);
    open(block.barrier);
  } else {
    block.barrier.waiting.push_back(&thread);
    suspend("__syncthreads", 0, site);
  }
  ++thread.clock.block_waits;
  switch (vote) {
    case Vote::count: return block.last_count;
    case Vote::all: return block.last_count == int(block.threads.size());
    case Vote::any: return block.last_count > 0;
    default: return 0;
  }
}

void arrive_cluster(Site site) {
  Clock& clock = current->clock;
  if (clock.cluster_arrivals != clock.cluster_waits) {
    fail(name(*current) + " arrives twice at the cluster barrier at " + name(site) + " without waiting");
  }
  ++clock.cluster_arrivals;
  Barrier& barrier = current->block->cluster->barrier;
  if (arrive(barrier, "the cluster barrier", site)) open(barrier);
}

void wait_cluster(Site site) {
  Thread& thread = *current;
  Clock& clock = thread.clock;
  Barrier& barrier = thread.block->cluster->barrier;
  if (clock.cluster_arrivals == clock.cluster_waits) {
    fail(name(thread) + " waits at the cluster barrier at " + name(site) + " without having arrived");
  }
  if (barrier.phase == clock.cluster_waits) {
    barrier.waiting.push_back(&thread);
    suspend("the cluster barrier", 0, site);
  }
  ++clock.cluster_waits;
  clock.segment = 0;
}

uint64_t meet_warp(WarpOperation operation, const char* what, unsigned mask, uint64_t value, unsigned source,
                   Site site) {
  Thread& thread = *current;
  Warp& warp = *thread.warp;
  const auto call = [&] { return name(thread) + " calls " + what + " at " + name(site) + " with mask " + hex(mask); };
  if (!(mask >> thread.lane & 1)) fail(call() + ", which lacks its own lane");
  if (mask & ~warp.present) fail(call() + ", but its warp has lanes " + hex(warp.present));
  const auto same_mask = [=](const Meeting& meeting) { return meeting.mask == mask; };
  auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(), same_mask);
  if (meeting == warp.meetings.end()) {
    meeting = warp.meetings.insert(meeting, {mask, 0, operation, what, site});
  } else if (meeting->operation != operation || meeting->site != site) {
    fail(name(thread) + " is in " + what + " at " + name(site) + ", other lanes of mask " + hex(mask) + " are in " +
         meeting->what + " at " + name(meeting->site));
  }
  thread.value = value;
  thread.source = source;
  meeting->arrived |= 1u << thread.lane;
  if (meeting->arrived != mask) {
    suspend(what, mask, site);
    return thread.value;
  }
  warp.meetings.erase(meeting);
  conclude(operation, what, warp.lanes, mask);
  for (uint32_t i = 0; i < 32; ++i) {
    if (i != thread.lane && (mask >> i & 1)) wake(*warp.lanes[i]);
  }
  return thread.value;
}

void* map_shared(const void* address, unsigned rank, Site site) {
  const SharedMemory& shared = grid->module->shared;
  uint32_t owner;
  const size_t offset = shared.offset(reinterpret_cast<uintptr_t>(address), owner);
  if (offset == SharedMemory::kOutside || owner != current->block->rank) {
    fail(name(*current) + " maps an address at " + name(site) + " that is not in its own shared memory");
  }
  if (rank >= current->block->cluster->blocks.size()) {
    fail(name(*current) + " maps shared memory of block rank " + std::to_string(rank) + " at " + name(site) +
         "; the cluster has " + std::to_string(current->block->cluster->blocks.size()) + " blocks");
  }
  return reinterpret_cast<void*>(shared.address(offset, rank));
}

void trap(const char* what, Site site) { fail(name(*current) + ": " + what + " at " + name(site)); }

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }
dim3 block_extent() { return grid->shape.block; }
dim3 grid_extent() { return grid->shape.grid; }
unsigned lane_index() { return current->lane; }
unsigned cluster_rank() { return current->block->rank; }
dim3 cluster_extent() { return grid->shape.cluster; }

}  // namespace cuda_host
