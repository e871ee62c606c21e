// Reads a tensor's address, dtype, device, shape and strides from Python objects through DLPack's table of C functions,
// which torch has since 2.10 (torch.Tensor.__dlpack_c_exchange_api__): 20 ns a tensor, where five attributes read from
// Python take 400. The declarations are DLPack's own (dmlc/dlpack, version 1.2), as far as they are used.
#pragma once

#include <pybind11/pybind11.h>

#include <string_view>
#include <vector>

namespace bigmodel::bind {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void *allocator, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

// Goes over the tensors of several lists: word(w) for everything that a table's checks depend on, which is all but the
// addresses, and address(list, row, a) for those. None is a word of its own, and so is an address of 0, which tensors
// without memory have. False as soon as word() is.
template <class Word, class Address>
bool visit_tensors(pybind11::capsule capsule, pybind11::tuple lists, Word word, Address address) {
  const auto* api = capsule.get_pointer<DLPackExchangeAPI>();
  if (api->major != 1 || !api->tensor_from_object) throw pybind11::type_error("unknown version of DLPack");
  for (size_t place = 0; place < lists.size(); ++place) {
    const auto list = pybind11::reinterpret_steal<pybind11::object>(
        PySequence_Fast(pybind11::object(lists[place]).ptr(), "tensors must be in a sequence"));
    if (!list) throw pybind11::error_already_set();
    const Py_ssize_t rows = PySequence_Fast_GET_SIZE(list.ptr());
    if (!word(rows)) return false;
    for (Py_ssize_t row = 0; row < rows; ++row) {
      PyObject* object = PySequence_Fast_GET_ITEM(list.ptr(), row);
      if (object == Py_None) {
        if (!word(-1)) return false;
        continue;
      }
      DLTensor tensor;
      if (api->tensor_from_object(object, &tensor)) throw pybind11::error_already_set();
      if (!word(int64_t(tensor.dtype_code) << 56 | int64_t(tensor.dtype_bits) << 48 |
                int64_t(tensor.device_type) << 32 | int64_t(tensor.device_id) << 8 | tensor.ndim))
        return false;
      if (!word(tensor.data != nullptr)) return false;
      for (int d = 0; d < tensor.ndim; ++d)
        if (!word(tensor.shape[d]) || !word(tensor.strides[d])) return false;
      address(place, row, reinterpret_cast<int64_t>(tensor.data) + int64_t(tensor.byte_offset));
    }
  }
  return true;
}

// Dtype, device, shape and strides of all tensors, as bytes that can be compared.
inline pybind11::bytes describe_tensors(pybind11::capsule api, pybind11::tuple lists) {
  std::vector<int64_t> words;
  visit_tensors(api, lists, [&](int64_t w) { return words.push_back(w), true; }, [](size_t, Py_ssize_t, int64_t) {});
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)};
}

// Writes the tensors' addresses into the columns of their table (table.h). False, with only some of them written, where
// the tensors are not as described.
inline bool read_addresses(pybind11::capsule api, pybind11::tuple lists, pybind11::bytes described, uintptr_t table,
                           int64_t rows) {
  const std::string_view bytes = described;
  const auto* next = reinterpret_cast<const int64_t*>(bytes.data());
  const auto* const end = next + bytes.size() / sizeof(int64_t);
  auto* const columns = reinterpret_cast<int64_t*>(table) + 2 * rows;
  return visit_tensors(
             api, lists, [&](int64_t w) { return next != end && *next++ == w; },
             [&](size_t list, Py_ssize_t row, int64_t address) { columns[list * rows + row] = address; }) &&
         next == end;
}

// All tensors of several lists in one, without the Nones.
inline pybind11::list flatten(pybind11::tuple lists) {
  pybind11::list all;
  for (pybind11::handle tensors : lists)
    for (pybind11::handle object : tensors)
      if (!object.is_none()) all.append(object);
  return all;
}

inline bool is_one_of(PyObject* object, pybind11::tuple classes) {
  for (pybind11::handle kind : classes)
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == kind.ptr()) return true;
  return false;
}

// Whether all tensors are of `classes` and torch.Tensor.is_neg, the first argument, of none is true.
inline bool all_plain(pybind11::object is_neg, pybind11::tuple classes, pybind11::tuple lists) {
  for (pybind11::handle tensors : lists)
    for (pybind11::handle tensor : tensors) {
      auto negative = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallOneArg(is_neg.ptr(), tensor.ptr()));
      if (!negative) throw pybind11::error_already_set();
      if (negative.ptr() == Py_True || !is_one_of(tensor.ptr(), classes)) return false;
    }
  return true;
}

// Whether a dictionary has these very keys and values, in this order.
inline bool same_items(pybind11::dict dict, pybind11::list keys, pybind11::list values) {
  if (dict.size() != keys.size()) return false;
  PyObject *key, *value;
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; PyDict_Next(dict.ptr(), &at, &key, &value); ++i)
    if (key != PyList_GET_ITEM(keys.ptr(), i) || value != PyList_GET_ITEM(values.ptr(), i)) return false;
  return true;
}

// (gradients, columns) of parameters: row i has the state states[i], and columns[c][i] is what that has under names[c],
// or None. None in all where a parameter is another object than in `before`, or one of them or their gradients is of
// another class than `classes`, or has none.
inline pybind11::object gradients_and_states(pybind11::list params, pybind11::tuple classes, pybind11::list before,
                                             pybind11::list states, pybind11::tuple names) {
  const pybind11::str name("grad");
  const size_t rows = params.size();
  if (before.size() != rows || states.size() != rows) return pybind11::none();
  pybind11::list grads(rows);
  pybind11::tuple columns(names.size());
  for (size_t c = 0; c < names.size(); ++c) columns[c] = pybind11::list(rows);
  for (size_t row = 0; row < rows; ++row) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), row);
    if (param != PyList_GET_ITEM(before.ptr(), row) || !is_one_of(param, classes)) return pybind11::none();
    auto grad = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(param, name.ptr()));
    if (!grad) throw pybind11::error_already_set();
    if (!is_one_of(grad.ptr(), classes)) return pybind11::none();
    PyList_SET_ITEM(grads.ptr(), row, grad.release().ptr());
    PyObject* state = PyList_GET_ITEM(states.ptr(), row);
    for (size_t c = 0; c < names.size(); ++c) {
      PyObject* value = PyDict_GetItemWithError(state, PyTuple_GET_ITEM(names.ptr(), c));
      if (!value && PyErr_Occurred()) throw pybind11::error_already_set();
      if (value && value != Py_None && !is_one_of(value, classes)) return pybind11::none();
      PyList_SET_ITEM(PyTuple_GET_ITEM(columns.ptr(), c), row, Py_NewRef(value ? value : Py_None));
    }
  }
  return pybind11::make_tuple(grads, columns);
}

}  // namespace bigmodel::bind
