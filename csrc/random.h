// The random bits of stochastic rounding, the same on every device: a hash of a key and a counter.
#pragma once

#include "op.h"

namespace bigmodel {

// splitmix64 (Steele, Lea, Flood 2014).
static BIGMODEL_SHARED inline uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The key of 2^32 elements: those of a row in one step whose index has `high` above its lower 32 bits.
static BIGMODEL_SHARED inline uint64_t random_key(uint64_t seed, int64_t row, int64_t step, int64_t high) {
  return mix(mix(mix(mix(seed) + uint64_t(row)) + uint64_t(step)) + uint64_t(high));
}

// 32 random bits of (key, counter); U is uint32_t or a vector of them. Twice the integer hash that C. Wellons' search
// found least biased (0x7feb352d, 0x846ca68b), with one half of the key before and the other between.
template <class U>
static BIGMODEL_SHARED inline U random_bits(U counter, uint64_t key) {
  U x = counter ^ uint32_t(key);
  for (int round = 0; round < 2; ++round) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x = (x ^ (x >> 16)) + (round == 0 ? uint32_t(key >> 32) : 0u);
  }
  return x;
}

}  // namespace bigmodel
