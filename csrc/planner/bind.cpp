// bigmodel._planner: the planner's arithmetic, without torch. With csrc/bind*, all that knows Python.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "path.h"

namespace py = pybind11;
using namespace bigmodel::planner;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Triple = std::tuple<int64_t, int64_t, int64_t>;

Job make_job(const std::vector<std::tuple<int64_t, int64_t, double, double, bool>>& configurations, double work,
             double restart, int64_t min_run, bool started, bool preemptible, bool runs, int64_t running,
             int64_t running_slots, double setup_left, std::vector<double> late, std::vector<double> early) {
  Job job{{},   work,    restart,       min_run,    started,         preemptible,
          runs, running, running_slots, setup_left, std::move(late), std::move(early)};
  bool sound = work > 0 && restart >= 0 && setup_left >= 0;
  for (const auto& [pool, devices, rate, startup, per_second] : configurations) {
    sound = sound && devices > 0 && rate > 0 && startup >= 0;
    job.configurations.push_back({pool, devices, rate, startup, per_second});
  }
  if (!sound) throw std::invalid_argument("planner: work, devices and rates must be above 0, and no hours below.");
  return job;
}

// A row per pool in both, a column per slot; the job's configurations and costs must lie inside.
Prices make_prices(const Job& job, const Array<double>& unit, const Array<int64_t>& free, double h, double stability,
                   int64_t first, int64_t last) {
  const bool alike =
      unit.ndim() == 2 && free.ndim() == 2 && unit.shape(0) == free.shape(0) && unit.shape(1) == free.shape(1);
  if (!alike || first < 0 || first >= last || last > unit.shape(1) || !(h > 0)) {
    throw std::invalid_argument("planner: unit and free must both be (pools, slots), the window inside, h above 0.");
  }
  const size_t slots = static_cast<size_t>(unit.shape(1));
  bool inside = job.late.size() == slots + 1 && job.early.size() == slots + 1;
  for (const Configuration& k : job.configurations) inside = inside && k.pool >= 0 && k.pool < unit.shape(0);
  if (!inside) throw std::invalid_argument("planner: the job's pools or slots are not those of the prices.");
  return {unit.data(), free.data(), static_cast<int64_t>(slots), h, stability};
}

// What the grid divides by, and configurations that it looks up, are there.
std::vector<Use> make_like(const Job& job, const std::vector<Triple>& like, int64_t per_slot, int64_t most) {
  if (per_slot < 1 || most < 1) throw std::invalid_argument("planner: the grid must have units.");
  std::vector<Use> alike;
  for (const auto& [slot, pool, devices] : like) {
    const bool known = std::any_of(
        job.configurations.begin(), job.configurations.end(),
        [pool = pool, devices = devices](const Configuration& k) { return k.pool == pool && k.devices == devices; });
    if (!known) throw std::invalid_argument("planner: like must hold configurations of the job.");
    alike.push_back({slot, pool, devices});
  }
  return alike;
}

std::pair<double, std::vector<Triple>> told(const Schedule& schedule) {
  std::vector<Triple> use;
  for (const Use& u : schedule.use) use.emplace_back(u.slot, u.pool, u.devices);
  return {schedule.cost, use};
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  py::enum_<Rounding>(m, "Rounding")
      .value("up", Rounding::up)
      .value("nearest", Rounding::nearest)
      .value("down", Rounding::down);
  py::class_<Job>(m, "Job").def(py::init(&make_job), py::kw_only(), py::arg("configurations"), py::arg("work"),
                                py::arg("restart"), py::arg("min_run"), py::arg("started"), py::arg("preemptible"),
                                py::arg("runs"), py::arg("running"), py::arg("running_slots"), py::arg("setup_left"),
                                py::arg("late"), py::arg("early"));
  m.def("cheapest_path", [](const Job& job, const Array<double>& unit, const Array<int64_t>& free, double h,
                            double stability, int64_t first, int64_t last, Rounding rounding, int64_t per_slot,
                            int64_t most, const std::vector<Triple>& like) {
    const Prices prices = make_prices(job, unit, free, h, stability, first, last);
    const std::vector<Use> alike = make_like(job, like, per_slot, most);
    Schedule found;
    {
      py::gil_scoped_release release;
      found = cheapest_path(job, prices, first, last, {rounding, per_slot, most}, alike);
    }
    return told(found);
  });
  m.def("cheapest_run", [](const Job& job, const Array<double>& unit, const Array<int64_t>& free, double h,
                           double stability, int64_t first, int64_t last) {
    const Prices prices = make_prices(job, unit, free, h, stability, first, last);
    Schedule found;
    {
      py::gil_scoped_release release;
      found = cheapest_run(job, prices, first, last);
    }
    return told(found);
  });
}
