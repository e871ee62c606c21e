// How rows cross the Python border, for whichever module binds them (_C, or one that tests build): bind_<rows>.h.
// Pointers and streams arrive as integers (0 is null), dtypes as codes of op.h; the GIL is released around every call.
#pragma once

#include <pybind11/pybind11.h>

#include "op.h"

namespace bigmodel::bind {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace bigmodel::bind
