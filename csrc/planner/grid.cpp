#include "grid.h"

#include <algorithm>
#include <numeric>

namespace bigmodel::planner {
namespace {

// Of the steps that divide the work, the 8 by which the slots of `like` are favoured least.
std::vector<double> matched(const Job& job, double h, double finest, const std::vector<Use>& like) {
  std::vector<double> shares;  // of the work, done in each slot of `like`
  Use before{-2, -1, -1};
  for (const Use& use : like) {
    const auto on = std::find_if(job.configurations.begin(), job.configurations.end(), [&](const Configuration& k) {
      return k.pool == use.pool && k.devices == use.devices;
    });
    const bool goes_on = before.slot == use.slot - 1 && before.pool == use.pool && before.devices == use.devices;
    const double lost = goes_on ? 0.0 : on->startup + job.restart;
    shares.push_back(std::max(0.0, h - lost) * on->rate / job.work);
    before = use;
  }
  const int64_t most = static_cast<int64_t>(std::ceil(job.work / finest - kTolerance));
  const int64_t least = std::max(int64_t{1}, static_cast<int64_t>(std::floor(static_cast<double>(most) / 1.4)));
  std::vector<std::pair<double, double>> found;  // (share of the work that is given away, units)
  for (int64_t count = least; count <= most; ++count) {
    const double units = static_cast<double>(count);
    double favour = 0.0;
    for (const double share : shares) favour += std::ceil(share * units - kTolerance) - share * units;
    found.emplace_back(favour / units, units);
  }
  const auto best = found.begin() + std::min<int64_t>(8, static_cast<int64_t>(found.size()));
  std::partial_sort(found.begin(), best, found.end());
  std::vector<double> steps;
  for (auto at = found.begin(); at != best; ++at) steps.push_back(job.work / at->second);
  return steps;
}

}  // namespace

Units choose_units(const Job& job, const std::vector<Configuration>& kept, double h, const Grid& grid,
                   const std::vector<Use>& like) {
  if (kept.empty()) return {1, job.work};
  double slowest = kept[0].rate;
  for (const Configuration& k : kept) slowest = std::min(slowest, k.rate);
  const double finest =
      std::max(slowest * h / static_cast<double>(grid.per_slot), job.work / static_cast<double>(grid.most));
  if (job.work <= finest) return {1, job.work};
  std::vector<double> steps;
  if (!like.empty()) {
    steps = matched(job, h, finest, like);
  } else {
    const int64_t tried = grid.rounding == Rounding::up ? 256 : 32;
    const double widest = std::min(1.4 * finest, job.work);
    for (int64_t i = 0; i < tried; ++i) {
      steps.push_back(finest + static_cast<double>(i) * ((widest - finest) / static_cast<double>(tried - 1)));
    }
  }
  double step = steps[0], least = 0.0;
  for (size_t i = 0; i < steps.size(); ++i) {
    double error = 0.0;
    for (const Configuration& k : kept) {
      const double units = k.rate * h / steps[i];
      const double whole = grid.rounding == Rounding::up     ? std::ceil(units)
                           : grid.rounding == Rounding::down ? std::floor(units)
                                                             : std::nearbyint(units);
      error += std::abs(whole / units - 1);
    }
    if (i == 0 || error < least) step = steps[i], least = error;
  }
  const double count = job.work / step;
  const int64_t units = static_cast<int64_t>(grid.rounding == Rounding::up ? std::floor(count + kTolerance)
                                                                           : std::ceil(count - kTolerance));
  return {std::max(int64_t{1}, units), step};
}

}  // namespace bigmodel::planner
