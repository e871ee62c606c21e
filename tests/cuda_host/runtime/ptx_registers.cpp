#include <algorithm>

#include "ptx.h"

namespace cuda_host::ptx {

void number_registers(Function& function, uint32_t count, const std::map<uint64_t, uint32_t>& constants) {
  constexpr uint32_t kNone = ~0u;
  std::vector<uint32_t> numbers(count, kNone);
  numbers[kTrue] = kTrue;
  function.start = {1};
  for (const auto& [value, index] : constants) {
    numbers[index] = uint32_t(function.start.size());
    function.start.push_back(value);
  }
  function.registers = uint32_t(function.start.size());
  const auto number = [&](uint32_t& index) {
    if (numbers[index] == kNone) numbers[index] = function.registers++;
    index = numbers[index];
  };
  const auto number_all = [&](std::vector<uint32_t>& indices) {
    std::for_each(indices.begin(), indices.end(), number);
  };
  for (auto& [index, value] : function.special) number(index);
  for (auto& [index, offset] : function.arguments) number(index);
  number_all(function.parameters);
  number_all(function.results);
  for (Instruction& i : function.code) {
    number(i.guard);
    std::for_each(i.registers.begin(), i.registers.begin() + i.count, number);
  }
  for (Call& call : function.calls) {
    number_all(call.arguments);
    number_all(call.results);
  }
}

}  // namespace cuda_host::ptx
