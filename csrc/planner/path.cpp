#include "path.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "grid.h"

namespace bigmodel::planner {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What a start commits to: units done after each slot, and hours lost in it.
struct Commitment {
  std::vector<int64_t> done;
  std::vector<double> lost;

  int64_t slots() const { return static_cast<int64_t>(done.size()); }
};

// By units left from 1 on, as far as a commitment does them: the share of the slot in which they end that is paid.
// ends[q]: the units that end in slots 0 to q.
struct Ending {
  std::vector<double> share;
  std::vector<int64_t> ends;
};

// A configuration that has devices in some slot. price: of each slot of the window, infinite without devices. reach:
// how many slots from each on have devices without a break.
struct Column {
  Configuration on;
  int64_t k;
  double loss;
  std::vector<double> price;
  std::vector<int64_t> reach;
  Commitment start, stay;
  Ending start_ends, stay_ends;
  bool tied;
  int64_t table;
};

std::vector<Column> columns_of(const Job& job, const Prices& prices, int64_t first, int64_t last) {
  std::vector<Column> columns;
  for (size_t k = 0; k < job.configurations.size(); ++k) {
    const Configuration& on = job.configurations[k];
    Column column{on, static_cast<int64_t>(k), on.startup + job.restart, {}, {}, {}, {}, {}, {}, false, 0};
    column.tied = column.loss > 0 || job.min_run > 1;
    column.reach.assign(last - first + 1, 0);
    for (int64_t s = first; s < last; ++s) {
      const bool usable = prices.free[on.pool * prices.slots + s] >= on.devices;
      const double price = prices.unit[on.pool * prices.slots + s] * static_cast<double>(on.devices) * prices.h;
      column.price.push_back(usable ? price : kInfinity);
    }
    for (int64_t s = last - first - 1; s >= 0; --s) {
      if (column.price[s] < kInfinity) column.reach[s] = column.reach[s + 1] + 1;
    }
    if (*std::max_element(column.reach.begin(), column.reach.end()) > 0) columns.push_back(std::move(column));
  }
  return columns;
}

// Memory that the tables of a thread take turns in: its first touch cost a quarter of a table's time.
double* scratch(int64_t size) {
  thread_local std::unique_ptr<double[]> room;
  thread_local int64_t held = 0;
  if (held < size) {
    room.reset(new double[size]);
    held = size;
  }
  return room.get();
}

// out[i] = min(base[i], after[i] + paid), from <= i < to; out and base may be one.
void go_on(double* out, const double* base, const double* after, int64_t from, int64_t to, double paid) {
#pragma GCC ivdep
  for (int64_t i = from; i < to; ++i) out[i] = std::min(after[i] + paid, base[i]);
}

// out[i] = min(out[i], paid + price * share[i - 1]), from <= i < to: share begins at one unit, and may be empty
void finish(double* out, const double* share, int64_t from, int64_t to, double paid, double price) {
#pragma GCC ivdep
  for (int64_t i = from; i < to; ++i) out[i] = std::min(paid + price * share[i - 1], out[i]);
}

class Table {
 public:
  Table(const Job& job, const Prices& prices, int64_t first, int64_t last, const Grid& grid,
        const std::vector<Use>& like)
      : job_(job), prices_(prices), first_(first), slots_(last - first), rounding_(grid.rounding) {
    columns_ = columns_of(job, prices, first, last);
    std::vector<Configuration> kept;
    for (const Column& column : columns_) kept.push_back(column.on);
    const Units chosen = choose_units(job, kept, prices.h, grid, like);
    units_ = chosen.count;
    step_ = chosen.step;
    tables_ = 1;
    longest_ = 1;
    for (Column& column : columns_) {
      column.start = commit(column, column.loss, job.min_run);
      column.stay = {{rounded(column.on.rate * prices_.h)}, {0.0}};
      column.start_ends = ending(column, column.start);
      column.stay_ends = ending(column, column.stay);
      column.table = column.tied ? tables_++ : 0;
      longest_ = std::max(longest_, column.start.slots());
    }
    bound_units();
  }

  Schedule best() {
    std::vector<Option> options;
    if (job_.runs) options_of_the_running(options);
    const bool leaves = !job_.runs || (job_.preemptible && job_.running_slots >= job_.min_run) || job_.running < 0;
    if (high_[0] < units_) return {kInfinity, {}};
    fill(leaves, options);
    const Option* least = nullptr;
    for (const Option& option : options) {
      if (option.cost < kInfinity && (least == nullptr || option.cost < least->cost)) least = &option;
    }
    if (least == nullptr) return {kInfinity, {}};
    Schedule schedule{least->cost, {}};
    if (rounding_ != Rounding::up && !follow(*least, schedule.use)) return {kInfinity, {}};
    return schedule;
  }

 private:
  // A first start: configuration, what it commits to, slot. column -1: as any later start, to be looked up.
  struct Option {
    double cost;
    int64_t column;
    Commitment commitment;
    int64_t slot;
  };

  int64_t rounded(double work) const { return round_units(work / step_, rounding_); }

  Commitment commit(const Column& column, double loss, int64_t least) const {
    const double h = prices_.h, rate = column.on.rate;
    const int64_t set_up = whole(std::ceil(loss / h - kTolerance));
    // What reaches past the window is never finished.
    const int64_t slots = std::min(std::max({least, set_up, int64_t{1}}), slots_);
    Commitment made;
    for (int64_t q = 0; q < slots; ++q) {
      const double elapsed = static_cast<double>(q) * h;
      made.done.push_back(rounded(std::max(0.0, elapsed + h - loss) * rate));
      made.lost.push_back(std::min(h, std::max(0.0, loss - elapsed)));
    }
    return made;
  }

  // The share of a slot that is paid when the job ends in it, `units` left after `lost` hours of it.
  double share(const Column& column, int64_t units, double lost) const {
    if (!column.on.per_second) return 1.0;
    return std::min(1.0, (lost + static_cast<double>(units) * (step_ / column.on.rate)) / prices_.h);
  }

  Ending ending(const Column& column, const Commitment& made) const {
    Ending end;
    int64_t before = 0;
    for (int64_t q = 0; q < made.slots(); ++q) {
      const int64_t top = std::min(made.done[q], units_);
      for (int64_t units = 1; units <= top - before; ++units) end.share.push_back(share(column, units, made.lost[q]));
      before = std::max(before, top);
      end.ends.push_back(before);
    }
    return end;
  }

  // Units that can be left at each slot, and from which the work can still be done. No row is read outside of them.
  void bound_units() {
    std::vector<int64_t> most(slots_, 0);
    for (const Column& column : columns_) {
      const int64_t gain = whole(std::ceil(column.on.rate * prices_.h / step_));
      for (int64_t s = 0; s < slots_; ++s) {
        if (column.reach[s] > 0) most[s] = std::max(most[s], gain);
      }
    }
    low_.assign(slots_ + 1, 1);
    high_.assign(slots_ + 1, 0);
    int64_t left = units_;
    for (int64_t s = 0; s <= slots_; ++s) {
      low_[s] = std::max(left, int64_t{1});
      if (s < slots_) left -= std::min(left, most[s]);
    }
    for (int64_t s = slots_ - 1; s >= 0; --s) high_[s] = std::min(units_, high_[s + 1] + most[s]);
  }

  void options_of_the_running(std::vector<Option>& options) {
    for (size_t c = 0; c < columns_.size(); ++c) {
      if (columns_[c].k != job_.running) continue;
      const int64_t least = std::max(int64_t{1}, job_.min_run - job_.running_slots);
      options.push_back({kInfinity, static_cast<int64_t>(c), commit(columns_[c], job_.setup_left, least), 0});
      longest_ = std::max(longest_, options.back().commitment.slots());
    }
  }

  // Every row, the last slot's first, and what the first start costs: `options` comes with the one in which a running
  // job goes on, without its cost.
  void fill(bool leaves, std::vector<Option>& options) {
    rows_ = rounding_ == Rounding::up ? std::min(slots_, longest_) + 1 : slots_ + 1;
    width_ = 1;
    for (int64_t s = 0; s <= slots_; ++s) width_ = std::max(width_, high_[s] - low_[s] + 1);
    memory_ = scratch(tables_ * rows_ * width_);
    const double restart = job_.started ? job_.restart : 0.0;
    const double moved = job_.runs ? prices_.stability : 0.0;
    const bool usual = restart == job_.restart && std::all_of(job_.early.begin(), job_.early.end(), is_zero);
    const size_t firsts = options.size();
    for (size_t c = 0; leaves && !usual && c < columns_.size(); ++c) {
      const Commitment made = commit(columns_[c], columns_[c].on.startup + restart, job_.min_run);
      options.push_back({kInfinity, static_cast<int64_t>(c), made, 0});
    }
    for (int64_t s = slots_ - 1; s >= 0; --s) {
      fill_row(s);
      for (size_t i = firsts; i < options.size(); ++i) {
        Option& option = options[i];
        const double cost = start_cost(option.column, option.commitment, s, units_) + job_.early[first_ + s] + moved;
        if (cost <= option.cost) option.cost = cost, option.slot = s;
      }
    }
    for (size_t i = 0; i < firsts; ++i) {
      options[i].cost = start_cost(options[i].column, options[i].commitment, 0, units_);
    }
    if (leaves && usual) options.push_back({at(0, 0, units_) + moved, -1, {}, 0});
  }

  static bool is_zero(double value) { return value == 0.0; }

  // The row of a table at slot s, to be indexed by units left.
  double* row(int64_t table, int64_t s) const { return memory_ + (table * rows_ + s % rows_) * width_ - low_[s]; }

  double at(int64_t table, int64_t s, int64_t units) const {
    if (units <= 0) return 0.0;
    return units > high_[s] ? kInfinity : row(table, s)[std::max(units, low_[s])];
  }

  void fill_row(int64_t s) {
    double* idle = row(0, s);
    const int64_t kept = std::min(high_[s], high_[s + 1]) + 1;
    std::copy(row(0, s + 1) + low_[s], row(0, s + 1) + std::max(low_[s], kept), idle + low_[s]);
    std::fill(idle + std::max(low_[s], kept), idle + high_[s] + 1, kInfinity);
    for (const Column& column : columns_) lower(idle, idle, column, column.start, column.start_ends, s);
    for (const Column& column : columns_) {
      if (column.tied) lower(row(column.table, s), idle, column, column.stay, column.stay_ends, s);
    }
  }

  // out = the lower of base and the cost of a configuration held from slot s on for what it commits to, by units left.
  void lower(double* out, const double* base, const Column& column, const Commitment& made, const Ending& end,
             int64_t s) const {
    const int64_t low = low_[s], high = high_[s] + 1, slots = std::min(made.slots(), column.reach[s]);
    const int64_t done = made.done.back(), after = s + slots;
    const bool goes_on = slots == made.slots();
    const int64_t from = goes_on ? std::clamp(done + 1, low, high) : high;
    const int64_t to = goes_on ? std::clamp(high_[after] + done + 1, from, high) : high;
    if (out != base) {
      std::copy(base + low, base + from, out + low);
      std::copy(base + to, base + high, out + to);
    }
    double paid = 0.0;
    int64_t units = low;
    for (int64_t q = 0; q < slots; ++q) {
      const double price = column.price[s + q];
      const int64_t top = std::clamp(end.ends[q] + 1, units, high);
      finish(out, end.share.data(), units, top, paid + job_.late[first_ + s + q + 1], price);
      units = top;
      paid += price;
    }
    if (from < to) go_on(out, base, row(column.table, after) - done, from, to, paid);
  }

  // --- the schedule --------------------------------------------------------------------------------------------------

  double start_cost(int64_t c, const Commitment& made, int64_t s, int64_t units) const {
    const Column& column = columns_[c];
    double paid = 0.0;
    for (int64_t q = 0; q < made.slots(); ++q) {
      if (s + q >= slots_) return kInfinity;
      if (made.done[q] >= units) {
        const int64_t before = q > 0 ? made.done[q - 1] : 0;
        return paid + column.price[s + q] * share(column, units - before, made.lost[q]) + job_.late[first_ + s + q + 1];
      }
      paid += column.price[s + q];
    }
    return paid + at(column.table, s + made.slots(), units - made.done.back());
  }

  // The best that can follow at slot s with so many units left, column `c` having run before; false if nothing can.
  bool next(int64_t c, int64_t s, int64_t units, Option& chosen) const {
    const double idle = at(0, s, units);
    if (c >= 0 && columns_[c].tied && at(columns_[c].table, s, units) < idle) {
      chosen = {0.0, c, columns_[c].stay, s};
      return true;
    }
    if (idle == kInfinity) return false;
    while (s < slots_ && idle == at(0, s + 1, units)) ++s;
    chosen.cost = kInfinity;
    for (size_t k = 0; s < slots_ && k < columns_.size(); ++k) {
      const double cost = start_cost(static_cast<int64_t>(k), columns_[k].start, s, units);
      if (cost < chosen.cost) chosen = {cost, static_cast<int64_t>(k), columns_[k].start, s};
    }
    return chosen.cost < kInfinity;
  }

  // The slots of a schedule, its real work followed; false if the grid let it end before that is done.
  bool follow(Option at, std::vector<Use>& use) const {
    double left = job_.work;
    if (at.column < 0 && !next(-1, 0, units_, at)) return false;
    while (true) {
      const Column& column = columns_[at.column];
      double worked = 0.0;
      for (int64_t q = 0; q < at.commitment.slots(); ++q) {
        if (at.slot + q >= slots_ || column.price[at.slot + q] == kInfinity) return false;
        use.push_back({first_ + at.slot + q, column.on.pool, column.on.devices});
        worked += (prices_.h - at.commitment.lost[q]) * column.on.rate;
        if (worked >= left * (1 - kTolerance)) return true;
      }
      left -= worked;
      const int64_t units = std::min(units_, static_cast<int64_t>(std::ceil(left / step_ - kTolerance)));
      if (!next(at.column, at.slot + at.commitment.slots(), units, at)) return false;
    }
  }

  const Job& job_;
  const Prices& prices_;
  const int64_t first_, slots_;
  const Rounding rounding_;
  std::vector<Column> columns_;
  int64_t units_, tables_, longest_, rows_ = 0, width_ = 0;
  double step_;
  std::vector<int64_t> low_, high_;  // by slot: the units left between which a row is filled
  double* memory_ = nullptr;
};

}  // namespace

Schedule cheapest_path(const Job& job, const Prices& prices, int64_t first, int64_t last, const Grid& grid,
                       const std::vector<Use>& like) {
  return Table(job, prices, first, last, grid, like).best();
}

}  // namespace bigmodel::planner
