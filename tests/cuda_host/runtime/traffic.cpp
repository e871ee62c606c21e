#include "traffic.h"

#include <algorithm>

namespace cuda_host {
namespace {

constexpr uintptr_t kSectorBytes = 32, kBankBytes = 4, kBanks = 32, kWavefrontBytes = kBanks * kBankBytes;

template <class T>
void keep_unique(std::vector<T>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

}  // namespace

void WarpTraffic::note(uint32_t lane, const TrafficKey& key, uintptr_t address) {
  const auto same = [&](const Place& place) { return place.key.pc == key.pc && place.key.bytes == key.bytes; };
  // A lane mostly walks through the places in the order in which the first one found them.
  const size_t guess = last_ + 1 < used_ ? last_ + 1 : 0;
  if (guess < used_ && same(places_[guess])) {
    last_ = guess;
  } else {
    last_ = size_t(std::find_if(places_.begin(), places_.begin() + long(used_), same) - places_.begin());
    if (last_ == used_) {
      if (++used_ > places_.size()) places_.emplace_back();
      places_[last_].key = key;
      places_[last_].instances.clear();
      std::fill_n(places_[last_].times, 32, 0);
    }
  }
  Place& place = places_[last_];
  const uint32_t time = place.times[lane]++;
  if (time == place.instances.size()) place.instances.emplace_back();
  place.instances[time].mask |= 1u << lane;
  place.instances[time].address[lane] = address;
}

void WarpTraffic::flush(Traffic& traffic) {
  for (size_t i = 0; i < used_; ++i) {
    TrafficCount& total = traffic[places_[i].key];
    for (const Instance& instance : places_[i].instances) count(places_[i].key, instance, total);
  }
  used_ = last_ = 0;
}

void WarpTraffic::count(const TrafficKey& key, const Instance& instance, TrafficCount& total) {
  std::vector<uintptr_t> units;  // sectors, or words in shared memory
  ++total.accesses;
  if (!key.shared) {
    std::vector<uintptr_t> addresses;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      if (!(instance.mask >> lane & 1)) continue;
      const uintptr_t begin = instance.address[lane], end = begin + key.bytes;
      addresses.push_back(begin);
      for (uintptr_t sector = begin / kSectorBytes; sector * kSectorBytes < end; ++sector) units.push_back(sector);
    }
    keep_unique(units);
    keep_unique(addresses);
    total.cost += units.size();
    total.least += (addresses.size() * key.bytes + kSectorBytes - 1) / kSectorBytes;
    return;
  }
  // Wide accesses go in groups of as many lanes as fill a wavefront; within one, a bank serves one word.
  const uint32_t group = std::max<uint32_t>(1, std::min<uint32_t>(32, kWavefrontBytes / key.bytes));
  for (uint32_t first = 0; first < 32; first += group) {
    units.clear();
    for (uint32_t lane = first; lane < first + group; ++lane) {
      if (!(instance.mask >> lane & 1)) continue;
      const uintptr_t begin = instance.address[lane], end = begin + key.bytes;
      for (uintptr_t word = begin / kBankBytes; word * kBankBytes < end; ++word) units.push_back(word);
    }
    if (units.empty()) continue;
    keep_unique(units);
    uint64_t most = 0, banks[kBanks] = {};
    for (uintptr_t word : units) most = std::max(most, ++banks[word % kBanks]);
    total.cost += most;
    total.least += (units.size() + kBanks - 1) / kBanks;
  }
}

}  // namespace cuda_host
