#include "grid.h"

#include <map>
#include <mutex>
#include <tuple>

#include "access.h"
#include "memory.h"
#include "report.h"

namespace cuda_host {

thread_local Thread* current = nullptr;
Grid* grid = nullptr;

namespace {

Stacks stacks;

uint3 unravel(uint32_t i, dim3 extent) { return {i % extent.x, i / extent.x % extent.y, i / extent.x / extent.y}; }

// Leaves `from` for the next thread of the block that can go on, or for the scheduler.
void leave(Fibre& from, Block& block) {
  const Fibre* to = &grid->scheduler;
  current = nullptr;
  if (!block.ready.empty()) {
    current = block.ready.front();
    block.ready.pop_front();
    to = &current->fibre;
  }
  cuda_host_switch(&from, to);
}

void live() {
  grid->call(grid->code, reinterpret_cast<const void*>(grid->arguments));
  Thread& thread = *current;
  thread.state = Thread::State::exited;
  ++thread.block->exited;
  leave(thread.fibre, *thread.block);
}

// What is the same for every block of the grid.
void build(Block& block, size_t first_stack) {
  const dim3 extent = grid->shape.block;
  const uint32_t count = extent.x * extent.y * extent.z;
  block.threads.resize(count);
  block.warps.resize((count + 31) / 32);
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.stack_low = stacks.low(first_stack + i);
    thread.stack_high = stacks.high(first_stack + i);
    thread.index = unravel(i, extent);
    thread.linear = i;
    thread.lane = i % 32;
    thread.block = &block;
    thread.warp = &block.warps[i / 32];
    thread.warp->lanes[thread.lane] = &thread;
    thread.warp->present |= 1u << thread.lane;
  }
}

void reset(Block& block) {
  block.barrier = Barrier{};
  block.barrier.expected = uint32_t(block.threads.size());
  block.exited = 0;
  block.count = 0;
  for (Thread& thread : block.threads) {
    thread.state = Thread::State::ready;
    thread.clock = Clock{};
    thread.copies.clear();
    thread.committed_groups = 0;
    start(thread.fibre, thread.stack_low, thread.stack_high, live);
    block.ready.push_back(&thread);
  }
}

void reset(Cluster& cluster, uint3 index) {
  const dim3 shape = grid->shape.cluster, extent = grid->shape.grid;
  cluster.barrier = Barrier{};
  cluster.barrier.expected = uint32_t(cluster.blocks.size() * cluster.blocks[0].threads.size());
  cluster.first_segment = races.next();
  for (uint32_t rank = 0; rank < cluster.blocks.size(); ++rank) {
    Block& block = cluster.blocks[rank];
    const uint3 within = unravel(rank, shape);
    block.index = {index.x * shape.x + within.x, index.y * shape.y + within.y, index.z * shape.z + within.z};
    block.linear = block.index.x + extent.x * (block.index.y + extent.y * block.index.z);
    block.rank = rank;
    block.cluster = &cluster;
    reset(block);
  }
}

// Who waits where, when nobody can go on.
std::string stuck(const Cluster& cluster) {
  using Place = std::tuple<std::string, std::string, uint32_t>;
  std::map<Place, std::pair<int, const Thread*>> groups;
  for (const Block& block : cluster.blocks) {
    for (const Thread& thread : block.threads) {
      const bool exited = thread.state == Thread::State::exited;
      const Place place = exited ? Place{} : Place{thread.meeting, name(thread.site), thread.mask};
      auto& group = groups[place];
      if (group.first++ == 0) group.second = &thread;
    }
  }
  std::string text = "barrier or warp operation not reached by all threads that must reach it:";
  for (const auto& [place, group] : groups) {
    const auto& [meeting, site, mask] = place;
    text += (text.back() == ':' ? " " : "; ") + std::to_string(group.first) + " threads, " + name(*group.second) +
            " first, " + (meeting.empty() ? "have exited" : "wait in " + meeting + " at " + site) +
            (mask ? " with mask " + hex(mask) : "");
  }
  return text;
}

void drive(Cluster& cluster) {
  for (;;) {
    bool moved = false, finished = true;
    for (Block& block : cluster.blocks) {
      if (!block.ready.empty()) {
        moved = true;
        grid->module->shared.make_live(block.rank);
        leave(grid->scheduler, block);
        if (!grid->failure.empty()) throw Violation(grid->failure);
      }
      finished &= block.finished();
    }
    if (finished) break;
    if (!moved) throw Violation(stuck(cluster));
  }
  if (!grid->suspicion.empty()) throw Violation(grid->suspicion);
  for (Block& block : cluster.blocks) {
    for (Warp& warp : block.warps) warp.traffic.flush(traffic);
  }
}

}  // namespace

void run(Grid& launched) {
  const dim3 shape = launched.shape.cluster, extent = launched.shape.grid;
  const dim3 clusters(extent.x / shape.x, extent.y / shape.y, extent.z / shape.z);
  const uint32_t blocks = shape.x * shape.y * shape.z;
  const size_t threads = size_t(launched.shape.block.x) * launched.shape.block.y * launched.shape.block.z;
  stacks.reserve(blocks * threads);
  races.begin_launch();
  launched.first_segment = races.next();
  launched.cluster.blocks.resize(blocks);
  SharedMemory& shared = launched.module->shared;
  shared.begin_launch(shared_block(*launched.module), blocks, launched.shape.dynamic_shared_bytes);

  struct Scope {
    explicit Scope(Grid& launched) { grid = &launched; }
    ~Scope() { grid = nullptr, current = nullptr; }
  } scope(launched);
  for (uint32_t rank = 0; rank < blocks; ++rank) build(launched.cluster.blocks[rank], rank * threads);
  const uint64_t count = uint64_t(clusters.x) * clusters.y * clusters.z;
  for (uint64_t i = 0; i < count; ++i) {
    shared.make_live(0);
    reset(launched.cluster, unravel(uint32_t(i), clusters));
    drive(launched.cluster);
  }
}

void fail(const std::string& what) {
  if (!current) throw Violation(what);
  grid->failure = what;
  Fibre& abandoned = current->fibre;
  current = nullptr;
  cuda_host_switch(&abandoned, &grid->scheduler);
  __builtin_unreachable();
}

void suspend(const char* meeting, uint32_t mask, Site site) {
  Thread& thread = *current;
  thread.state = Thread::State::waiting;
  thread.meeting = meeting;
  thread.mask = mask;
  thread.site = site;
  leave(thread.fibre, *thread.block);
}

void wake(Thread& thread) {
  thread.state = Thread::State::ready;
  thread.block->ready.push_back(&thread);
}

std::string name(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string name(const Thread& thread) {
  return "block " + name(thread.block->index) + " thread " + name(thread.index);
}

std::string name_of_segment(uint32_t id) {
  const Races::Segment& segment = races.segment(id);
  return "block " + name(unravel(segment.block, grid->shape.grid)) + " thread " +
         name(unravel(segment.thread, grid->shape.block));
}

std::string name(Site site) {
  const std::string file = site.file;
  if (grid && file == grid->module->path) return code(file, uintptr_t(site.line));  // of PTX: a line of the text
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

}  // namespace cuda_host
