// The grid on which the dynamic programme counts work left.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "path.h"

namespace bigmodel::planner {

constexpr double kTolerance = 1e-9;
constexpr double kMost = 0x1p40;  // units or slots: more than any table has, and no sum of them overflows

// A whole number, at most kMost.
inline int64_t whole(double value) { return static_cast<int64_t>(std::min(value, kMost)); }

struct Units {
  int64_t count;  // of all the work
  double step;    // work of one
};

inline int64_t round_units(double units, Rounding rounding) {
  if (rounding == Rounding::nearest) return whole(std::nearbyint(units));
  if (rounding == Rounding::up) return whole(std::ceil(units - kTolerance));
  return whole(std::floor(units + kTolerance));
}

// Of steps at least as wide as the grid asks and up to 1.4 times as wide, the one by which the rates of `kept` round
// least; where there is a schedule alike, among the 8 by which its slots round least. Work of no more than the finest
// step is one unit, and the step no more than the work.
Units choose_units(const Job& job, const std::vector<Configuration>& kept, double h, const Grid& grid,
                   const std::vector<Use>& like);

}  // namespace bigmodel::planner
