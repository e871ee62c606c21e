// What executor.py asks of the executor. The kernels' own modules link to this library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "access.h"
#include "grid.h"
#include "memory.h"
#include "ptx.h"
#include "report.h"

namespace py = pybind11;
using namespace cuda_host;

PYBIND11_MODULE(_executor, m) {
  py::register_exception<Violation>(m, "Violation", PyExc_RuntimeError);
  py::enum_<Role>(m, "Role")
      .value("input", Role::input)
      .value("output", Role::output)
      .value("scratch", Role::scratch)
      .value("updated", Role::updated);

  m.def("declare", [](const std::string& path, const std::vector<std::tuple<std::string, size_t, size_t, bool>>& shared,
                      const std::map<uintptr_t, int>& bounds) {
    Declaration declaration{{}, bounds};
    for (const auto& [name, offset, size, dynamic] : shared)
      declaration.shared.push_back({name, offset, size, dynamic});
    declare(path, std::move(declaration));
  });
  // The entries of a file of PTX, by the offset of their kernels in a library.
  m.def("declare_ptx", [](int arch, const std::string& path, const std::string& library,
                          const std::map<uintptr_t, std::string>& kernels) {
    std::map<uintptr_t, std::string> entries;
    for (const auto& [offset, name] : kernels) entries[begin_of(library) + offset] = name;
    ptx::declare(arch, path, entries);
  });
  m.def("execute_ptx", [](bool execute) { return std::exchange(ptx::execute, execute); });
  m.def("devices", [] {
    std::vector<std::string> names;
    for (int i = 0; i < device_count(); ++i) names.push_back(device(i).name);
    return names;
  });

  m.def("add_buffer", [](const std::string& name, Role role, uintptr_t address, size_t rows, size_t row_bytes,
                         size_t stride, size_t element_bytes) {
    global_memory.add({name, role, address, rows, row_bytes, stride, element_bytes, {}});
  });
  m.def("begin_call", &begin_call);
  m.def("end_call", &end_call);
  m.def("current_context", &current_context);
  m.def("set_current_context", &set_current_context);
  m.def("check_written", [] { global_memory.check_written(); });
  m.def("clear_buffers", [] {
    global_memory.clear();
    constexpr uint32_t kManySegments = 1u << 31;
    if (races.next() < kManySegments) return;
    races = Races();
    forget_shared_accesses();
    ptx::forget_shared_accesses();
  });

  // (kernel, code, shared, write, bytes of a lane, accesses, cost, least cost); code as {code:path:offset}
  m.def("take_traffic", [] {
    py::list rows;
    for (const auto& [key, count] : traffic) {
      const Module& library = module_of(key.kernel);
      rows.append(py::make_tuple(code(library.path, reinterpret_cast<uintptr_t>(key.kernel) - library.begin),
                                 code(key.module->path, key.pc), key.shared, key.write, key.bytes, count.accesses,
                                 count.cost, count.least));
    }
    traffic.clear();
    return rows;
  });
}
