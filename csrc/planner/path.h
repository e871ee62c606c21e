// One job at given prices: its cheapest schedule by dynamic programming over (slot, work left, configuration).
//
// Work left lives on a grid. Rounded up, every rounding favours the job, and the value is a lower bound on the cost of
// any schedule; rounded down, every rounding is against it, and the schedule found does the whole work; rounded to the
// nearest, values are closest, and a schedule that ends short of the work is refused. Values at slot s, i units left:
//
//   idle[s][i]    nothing runs at the beginning of s; a start loses start-up and restart
//   run[k][s][i]  configuration k ran in slot s - 1 and may go on without loss
//
//   idle[s][i] = min(idle[s + 1][i], min_k cost of starting k in s)
//   run[k][s][i] = min(idle[s][i], cost of k going on in s)
//
// A start commits to m = max(min_run, slots of set-up) slots, in which the job may only stop because it is done; after
// them it pays run[k][s + m][i - units done]. A configuration that loses nothing at a start has no table of its own.
#pragma once

#include <cstdint>
#include <vector>

namespace bigmodel::planner {

struct Configuration {
  int64_t pool, devices;
  double rate;      // work per hour
  double startup;   // hours
  bool per_second;  // its last slot is paid pro rata
};

struct Job {
  std::vector<Configuration> configurations;
  double work, restart;  // restart: hours
  int64_t min_run;       // slots
  bool started, preemptible;
  bool runs;  // at the beginning of the window: it may go on without loss in `running`, -1 for no configuration
  int64_t running, running_slots;
  double setup_left;                // hours
  std::vector<double> late, early;  // by slot, slots + 1: what ending and starting there costs
};

// One slot of a schedule.
struct Use { int64_t slot, pool, devices; };

struct Schedule {
  double cost;  // infinite where there is none
  std::vector<Use> use;
};

struct Prices {
  const double* unit;   // currency per device-hour, (pools, slots)
  const int64_t* free;  // devices left, (pools, slots)
  int64_t slots;
  double h;          // hours of a slot
  double stability;  // cost of moving a job that runs
};

enum class Rounding { up, nearest, down };

struct Grid {
  Rounding rounding;
  int64_t per_slot;  // units in a slot's work of the slowest configuration
  int64_t most;      // units of all the work
};

// The cheapest schedule within slots first <= s < last, first < last. Rounded up it has a cost and no use, and only the
// rows of a few slots are kept. like: a schedule that resembles the one sought; the grid is chosen so that what it uses
// rounds least.
Schedule cheapest_path(const Job& job, const Prices& prices, int64_t first, int64_t last, const Grid& grid,
                       const std::vector<Use>& like);

// The cheapest unbroken run of a job that is not preemptible: exact, by sums over every start.
Schedule cheapest_run(const Job& job, const Prices& prices, int64_t first, int64_t last);

}  // namespace bigmodel::planner
