// A grid at work: threads in warps in blocks in clusters. Clusters run one after another, the blocks of a cluster by
// turns: each until none of its threads can go on.
#pragma once

#include <cuda_host/executor.h>

#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "fibre.h"
#include "races.h"
#include "traffic.h"

namespace cuda_host {

inline bool operator!=(Site a, Site b) { return a.line != b.line || std::strcmp(a.file, b.file) != 0; }

struct Block;
struct Cluster;
struct Warp;

// An asynchronous copy that was issued but not waited for. It belongs to the thread's group of that number.
struct Copy {
  uintptr_t to, from;
  size_t bytes;
  uint32_t group, segment;
};

struct Thread {
  enum class State { ready, waiting, exited };

  Fibre fibre;
  uintptr_t stack_low = 0, stack_high = 0;
  uint3 index{};
  uint32_t linear = 0, lane = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  State state = State::ready;
  Clock clock;

  // The meeting that it waits for, and what it brought there; `value` is what it takes away.
  const char* meeting = nullptr;
  Site site{};
  uint32_t mask = 0;
  uint64_t value = 0;
  uint32_t source = 0;

  std::vector<Copy> copies;
  uint32_t committed_groups = 0;
};

struct Meeting {
  uint32_t mask, arrived;
  WarpOperation operation;
  const char* what;
  Site site;
};

struct Warp {
  Thread* lanes[32] = {};
  uint32_t present = 0;  // lanes that exist
  std::vector<Meeting> meetings;
  WarpTraffic traffic;
};

// What all threads of a group must reach, as often as each other.
struct Barrier {
  uint32_t expected = 0, arrived = 0, phase = 0;
  Site first{};
  std::vector<Thread*> waiting;
};

struct Block {
  uint32_t linear = 0, rank = 0;  // in the grid, in the cluster
  uint3 index{};
  Cluster* cluster = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::deque<Thread*> ready;
  Barrier barrier;
  uint32_t exited = 0;
  int count = 0;       // of the threads at the barrier, those whose predicate holds
  int last_count = 0;  // the same when it last opened
  bool finished() const { return exited == threads.size(); }
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
  uint32_t first_segment = 1;  // of the races' clock when it began
  bool contains(uint32_t linear) const {
    for (const Block& block : blocks) {
      if (block.linear == linear) return true;
    }
    return false;
  }
};

struct Module;

struct Grid {
  LaunchShape shape;
  const void* kernel;
  KernelCall call;
  const void* code;  // what `call` runs: the kernel itself, or the PTX that stands for it
  uintptr_t arguments, arguments_end;
  Module* module;
  Cluster cluster;
  uint32_t first_segment;
  Fibre scheduler;
  std::string failure;    // what ended the launch
  std::string suspicion;  // what will, unless the grid ends in a clearer failure
};

extern thread_local Thread* current __attribute__((tls_model("initial-exec")));  // null outside kernels
extern Grid* grid;                                                               // null outside launches

// Runs every block; throws Violation when a check fails.
void run(Grid& grid);

// Around a native call. The second throws Violation if the calling thread has another device than before, or if one was
// set current for nothing.
void begin_call();
void end_call();

// Ends the launch with a violation; in a fibre it never comes back.
[[noreturn]] void fail(const std::string& what);

// Suspends the running thread until `wake`.
void suspend(const char* meeting, uint32_t mask, Site site);
void wake(Thread& thread);

// "block (0,0,0) thread (3,0,0)"
std::string name(const Thread& thread);
std::string name_of_segment(uint32_t segment);
std::string name(uint3 index);
std::string name(Site site);

}  // namespace cuda_host
