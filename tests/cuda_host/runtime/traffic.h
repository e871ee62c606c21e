// Counts what a warp's accesses cost: 32-byte sectors in global memory, wavefronts over 32 banks in shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

namespace cuda_host {

struct Module;

struct TrafficKey {
  const void* kernel;
  const Module* module;  // whose code ran
  uint32_t pc;           // from the start of its image
  bool shared, write;
  uint32_t bytes;  // of one lane
  bool operator<(const TrafficKey& o) const {
    return std::tie(kernel, module, pc, shared, write, bytes) <
           std::tie(o.kernel, o.module, o.pc, o.shared, o.write, o.bytes);
  }
};

struct TrafficCount {
  uint64_t accesses = 0;  // by a warp
  uint64_t cost = 0;      // sectors or wavefronts that they took
  uint64_t least = 0;     // the fewest that could have carried the same bytes
};

using Traffic = std::map<TrafficKey, TrafficCount>;

// Lanes run one after another: the nth access of each at one place of the code since the last flush is taken as the
// warp's nth there.
class WarpTraffic {
 public:
  void note(uint32_t lane, const TrafficKey& key, uintptr_t address);
  void flush(Traffic& traffic);

 private:
  struct Instance {
    uint32_t mask = 0;  // lanes that took part
    uintptr_t address[32];
  };
  struct Place {
    TrafficKey key;
    uint32_t times[32];
    std::vector<Instance> instances;
  };
  static void count(const TrafficKey& key, const Instance& instance, TrafficCount& total);

  std::vector<Place> places_;  // the first used_ count; the others keep their memory for later
  size_t used_ = 0, last_ = 0;
};

}  // namespace cuda_host
