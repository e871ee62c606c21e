#include "races.h"

#include <algorithm>

#include "grid.h"

namespace cuda_host {

uint32_t Races::current(Thread& thread) {
  Clock& clock = thread.clock;
  if (clock.segment == 0) {
    clock.segment = next();
    segments_.push_back(
        {thread.block->linear, thread.linear, clock.block_arrivals, clock.cluster_arrivals, clock.warp_arrivals});
  }
  return clock.segment;
}

bool Races::ordered(uint32_t earlier, const Thread& now, uint32_t floor) const {
  if (earlier < floor || earlier < first_ || earlier == now.clock.segment) return true;
  const Segment& then = segment(earlier);
  const Clock& clock = now.clock;
  const bool same_block = then.block == now.block->linear;
  if (same_block && then.thread == now.linear) return true;
  if (then.in_flight) return false;
  if (same_block) {
    if (then.block_arrivals < clock.block_waits) return true;
    if (then.thread / 32 == now.linear / 32 && then.warp_arrivals < clock.seen[then.thread % 32]) return true;
  } else if (!now.block->cluster->contains(then.block)) {
    return false;
  }
  return then.cluster_arrivals < clock.cluster_waits;
}

int Races::distance(uint32_t earlier, const Thread& thread, uint32_t floor) const {
  if (ordered(earlier, thread, floor)) return 0;
  const Segment& then = segment(earlier);
  if (then.block != thread.block->linear) return 3;
  return then.thread / 32 != thread.linear / 32 ? 2 : 1;
}

Conflict Races::read(Cell* cells, size_t count, Thread& thread, uint32_t pc, uint32_t floor) {
  const uint32_t mine = current(thread);
  uint32_t checked = 0;
  for (Cell* cell = cells; cell != cells + count; ++cell) {
    if (cell->write.segment != checked) {
      if (!ordered(cell->write.segment, thread, floor)) return {cell->write, true};
      checked = cell->write.segment;
    }
    if (cell->read.segment != mine) {
      const int nearer = distance(cell->other_read.segment, thread, floor);
      if (distance(cell->read.segment, thread, floor) >= nearer) cell->other_read = cell->read;
      cell->read = {mine, pc};
    }
  }
  return {};
}

Conflict Races::write(Cell* cells, size_t count, Thread& thread, uint32_t pc, uint32_t floor) {
  const uint32_t mine = current(thread);
  Cell checked{};
  for (Cell* cell = cells; cell != cells + count; ++cell) {
    if (cell->write.segment != checked.write.segment && !ordered(cell->write.segment, thread, floor)) {
      return {cell->write, true};
    }
    for (const Access Cell::* read : {&Cell::read, &Cell::other_read}) {
      if ((cell->*read).segment != (checked.*read).segment && !ordered((cell->*read).segment, thread, floor)) {
        return {cell->*read, false};
      }
    }
    checked = *cell;
    *cell = {{mine, pc}, {}, {}};
  }
  return {};
}

void Races::begin_copy(Thread& thread) { thread.clock.segment = 0; }

uint32_t Races::end_copy(Thread& thread) {
  const uint32_t copy = current(thread);
  segments_[copy - first_].in_flight = true;
  thread.clock.segment = 0;
  return copy;
}

void Races::land(uint32_t copy, const Thread& thread) {
  const Clock& clock = thread.clock;
  segments_[copy - first_] = {thread.block->linear, thread.linear, clock.block_arrivals, clock.cluster_arrivals,
                              clock.warp_arrivals};
}

void Races::join(Thread* const* lanes, uint32_t mask) {
  std::array<uint32_t, 32> seen{};
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    Clock& clock = lanes[i]->clock;
    ++clock.warp_arrivals;
    clock.segment = 0;
    for (int j = 0; j < 32; ++j) seen[j] = std::max(seen[j], clock.seen[j]);
  }
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) seen[i] = lanes[i]->clock.warp_arrivals;
  }
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) lanes[i]->clock.seen = seen;
  }
}

}  // namespace cuda_host
