// Who touched which byte last, and whether a meeting of threads lies between two touches.
//
// A segment is what one thread does between two of its meetings. Every byte under watch has a cell with the last write
// and two reads since: the latest, and the one by the thread furthest from it. Two accesses are ordered if they are
// one thread's, or if a barrier of the block or cluster, or a __syncwarp of both lanes, was passed by both between.
// An asynchronous copy is a segment of its own: no barrier orders it until it has landed, and it counts from there.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace cuda_host {

struct Thread;

struct Access {
  uint32_t segment = 0;  // 0: none
  uint32_t pc = 0;       // from the start of the module's image
};

struct Cell { Access write, read, other_read; };

// Cells that start as zeros; pages that are never touched cost nothing.
class Cells {
 public:
  void resize(size_t count) {
    cells_.reset(count ? static_cast<Cell*>(std::calloc(count, sizeof(Cell))) : nullptr);
    count_ = count;
  }
  size_t size() const { return count_; }
  Cell* data() const { return cells_.get(); }

 private:
  struct Free {
    void operator()(Cell* cells) const { std::free(cells); }
  };
  std::unique_ptr<Cell, Free> cells_;
  size_t count_ = 0;
};

// A thread's logical time.
struct Clock {
  uint32_t segment = 0;  // 0: no access since the last meeting
  uint32_t block_arrivals = 0, block_waits = 0, cluster_arrivals = 0, cluster_waits = 0, warp_arrivals = 0;
  std::array<uint32_t, 32> seen{};  // warp_arrivals of each lane that this thread comes after
};

struct Conflict {
  Access earlier;  // segment 0: no conflict
  bool wrote = false;
  explicit operator bool() const { return earlier.segment != 0; }
};

class Races {
 public:
  struct Segment {
    uint32_t block, thread;  // linear indices
    uint32_t block_arrivals, cluster_arrivals, warp_arrivals;
    bool in_flight = false;
  };

  void begin_launch() { first_ += segments_.size(), segments_.clear(); }
  uint32_t next() const { return first_ + uint32_t(segments_.size()); }
  const Segment& segment(uint32_t id) const { return segments_[id - first_]; }

  // Notes the access; cells of segments before `floor` count as untouched.
  Conflict read(Cell* cells, size_t count, Thread& thread, uint32_t pc, uint32_t floor);
  Conflict write(Cell* cells, size_t count, Thread& thread, uint32_t pc, uint32_t floor);

  // Between these two the thread's accesses are those of a copy, whose segment is returned.
  static void begin_copy(Thread& thread);
  uint32_t end_copy(Thread& thread);
  void land(uint32_t copy, const Thread& thread);

  // All of what happened before the meeting in every lane of `mask` comes before what follows in each of them.
  static void join(Thread* const* lanes, uint32_t mask);

 private:
  uint32_t current(Thread& thread);
  bool ordered(uint32_t earlier, const Thread& now, uint32_t floor) const;
  // 0: ordered; then the same warp, the same block, the same cluster or grid.
  int distance(uint32_t earlier, const Thread& thread, uint32_t floor) const;

  std::vector<Segment> segments_;
  uint32_t first_ = 1;
};

}  // namespace cuda_host
