#include <algorithm>
#include <cmath>
#include <limits>

#include "grid.h"
#include "path.h"

namespace bigmodel::planner {

Schedule cheapest_run(const Job& job, const Prices& prices, int64_t first, int64_t last) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const double h = prices.h;
  const bool goes_on = job.runs && job.running >= 0;
  Schedule best{infinity, {}};
  for (int64_t k = 0; k < static_cast<int64_t>(job.configurations.size()); ++k) {
    if (goes_on && k != job.running) continue;
    const Configuration& on = job.configurations[k];
    const double loss = goes_on ? job.setup_left : on.startup + (job.started ? job.restart : 0.0);
    const double hours = loss + job.work / on.rate;
    const int64_t length = std::max(int64_t{1}, whole(std::ceil(hours / h - kTolerance)));
    const double part = on.per_second ? hours / h - static_cast<double>(length - 1) : 1.0;
    const int64_t* free = prices.free + on.pool * prices.slots;
    const double* unit = prices.unit + on.pool * prices.slots;
    int64_t usable = 0;  // slots without a break up to this one
    for (int64_t end = first; end < last; ++end) {
      usable = free[end] >= on.devices ? usable + 1 : 0;
      const int64_t start = end - length + 1;
      if (usable < length || start < first || (goes_on && start > first)) continue;
      double cost = 0.0;
      for (int64_t s = start; s < end; ++s) cost += unit[s];
      cost = (cost + unit[end] * part) * static_cast<double>(on.devices) * h + job.late[end + 1] + job.early[start];
      if (cost < best.cost) {
        best = {cost, {}};
        for (int64_t s = start; s <= end; ++s) best.use.push_back({s, on.pool, on.devices});
      }
    }
  }
  if (job.runs && job.running < 0) best.cost += prices.stability;
  return best;
}

}  // namespace bigmodel::planner
