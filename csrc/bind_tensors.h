// Reads a tensor's address, dtype, device, shape and strides from Python objects through DLPack's table of C functions,
// which torch has since 2.10 (torch.Tensor.__dlpack_c_exchange_api__): 20 ns a tensor, where five attributes read from
// Python take 400. The declarations are DLPack's own (dmlc/dlpack, version 1.2), as far as they are used.
#pragma once

#include <pybind11/pybind11.h>

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

// Everything about the tensors of several lists that a table depends on, as bytes to compare; None stands for itself.
inline pybind11::bytes describe_tensors(pybind11::capsule api_capsule, pybind11::tuple lists) {
  const auto* api = api_capsule.get_pointer<DLPackExchangeAPI>();
  if (api->major != 1 || !api->tensor_from_object) throw pybind11::type_error("unknown version of DLPack");
  std::vector<int64_t> words;
  for (pybind11::handle tensors : lists) {
    words.push_back(int64_t(pybind11::len(tensors)));
    for (pybind11::handle object : tensors) {
      if (object.is_none()) {
        words.push_back(-1);
        continue;
      }
      DLTensor tensor;
      if (api->tensor_from_object(object.ptr(), &tensor)) throw pybind11::error_already_set();
      words.push_back(reinterpret_cast<int64_t>(tensor.data) + int64_t(tensor.byte_offset));
      words.push_back(int64_t(tensor.dtype_code) << 56 | int64_t(tensor.dtype_bits) << 48 |
                      int64_t(tensor.device_type) << 32 | int64_t(tensor.device_id) << 8 | tensor.ndim);
      words.insert(words.end(), tensor.shape, tensor.shape + tensor.ndim);
      words.insert(words.end(), tensor.strides, tensor.strides + tensor.ndim);
    }
  }
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)};
}

}  // namespace bigmodel::bind
