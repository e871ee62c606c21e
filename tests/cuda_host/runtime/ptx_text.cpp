// Reads PTX: variables, functions, instructions with their operands.
#include <cxxabi.h>

#include <algorithm>
#include <cctype>
#include <optional>

#include "grid.h"
#include "ptx.h"
#include "ptx_tokens.h"
#include "report.h"

namespace cuda_host::ptx {
namespace {

// "slot" of the mangled kernel()::slot.
std::string plain(const std::string& mangled) {
  const std::unique_ptr<char, decltype(&std::free)> name(
      abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, nullptr), &std::free);
  const std::string text = name ? name.get() : mangled;
  const size_t colons = text.rfind("::");
  return colons == std::string::npos ? text : text.substr(colons + 2);
}

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

size_t bytes_of(const std::string& type) {  // ".b8", ".f64": the bits are what it ends with
  return std::stoul(type.substr(2)) / 8;
}

template <uint3 (*where)(), uint32_t uint3::* part>
uint64_t axis() {
  return where().*part;
}
uint3 extent_of_block() { return block_extent(); }
uint3 extent_of_grid() { return grid_extent(); }
uint64_t blocks_of_cluster() {
  const dim3 extent = cluster_extent();
  return uint64_t(extent.x) * extent.y * extent.z;
}
uint64_t rank_in_cluster() { return cluster_rank(); }

const std::map<std::string, uint64_t (*)()> kSpecial = {
    {"%tid.x", axis<thread_index, &uint3::x>},      {"%tid.y", axis<thread_index, &uint3::y>},
    {"%tid.z", axis<thread_index, &uint3::z>},      {"%ctaid.x", axis<block_index, &uint3::x>},
    {"%ctaid.y", axis<block_index, &uint3::y>},     {"%ctaid.z", axis<block_index, &uint3::z>},
    {"%ntid.x", axis<extent_of_block, &uint3::x>},  {"%ntid.y", axis<extent_of_block, &uint3::y>},
    {"%ntid.z", axis<extent_of_block, &uint3::z>},  {"%nctaid.x", axis<extent_of_grid, &uint3::x>},
    {"%cluster_nctarank", blocks_of_cluster},       {"%cluster_ctarank", rank_in_cluster},
    {"%nctaid.y", axis<extent_of_grid, &uint3::y>}, {"%nctaid.z", axis<extent_of_grid, &uint3::z>},
};

struct Operand {
  std::vector<uint32_t> registers;
  int64_t offset = 0;
  bool slot = false;   // a parameter of a call, which lies in a register
  std::string symbol;  // a label
};

class Reader : Tokens {
 public:
  Reader(Program& program, const std::string& text) : Tokens(program.module.path, text), program_(program) {
    while (!at_end()) top_level();
    for (const auto& [name, function] : program.functions) check_calls(name, *function);
    if (shared_end_ > Program::kDynamicOffset)
      refuse("more static shared memory than all kernels of one file may have");
    program_.module.shared.declare(std::move(shared_));
  }

 private:
  // --- what stands outside functions ---------------------------------------------------------------------------------
  void top_level() {
    const std::string word = peek();
    if (word == ".version" || word == ".target" || word == ".address_size" || word == ".file") return skip_line();
    if (word == ".section") return next(), next(), skip_braces();
    const bool external = word == ".extern";
    if (word == ".visible" || word == ".weak" || external) next();
    const std::string kind = next();
    if (kind == ".const" || kind == ".shared") return variable(kind == ".shared", external);
    if (kind == ".entry" || kind == ".func") return function(kind == ".entry");
    refuse("`" + kind + "` is not known");
  }

  void variable(bool shared, bool external) {
    size_t alignment = 1;
    if (accept(".align")) alignment = std::stoul(next());
    const size_t element = bytes_of(next());
    const std::string name = next();
    size_t count = 1;
    if (accept("[")) {
      count = peek() == "]" ? 0 : std::stoul(next());
      expect("]");
    }
    if (shared && external) {
      shared_.push_back({plain(name), Program::kDynamicOffset, Program::kDynamicSharedBytes, true});
      globals_[name] = Program::kDynamicOffset;
    } else if (shared) {
      shared_end_ = round_up(shared_end_, alignment);
      globals_[name] = shared_end_;
      shared_.push_back({plain(name), shared_end_, count * element, false});
      shared_end_ += count * element;
    } else {
      globals_[name] = constant_data(alignment, count, element);
    }
    expect(";");
  }

  // The address of an array of bytes with its values.
  uintptr_t constant_data(size_t alignment, size_t count, size_t element) {
    if (element != 1) refuse("constants are known as bytes only");
    std::vector<unsigned char>& image = program_.image;
    image_end_ = image_end_ ? image_end_ : last_line() + 2;
    while (reinterpret_cast<uintptr_t>(image.data() + image_end_) % alignment) ++image_end_;
    const size_t begin = image_end_;
    if (begin + count > image.size()) refuse("too many constants");
    image_end_ += count;
    if (accept("=")) {
      expect("{");
      for (size_t i = 0; !accept("}"); accept(",")) image[begin + i++] = static_cast<unsigned char>(std::stoul(next()));
    }
    return reinterpret_cast<uintptr_t>(image.data() + begin);
  }

  // --- functions -----------------------------------------------------------------------------------------------------
  void function(bool kernel) {
    scopes_.assign(1, {});
    constants_.clear();
    labels_.clear();
    jumps_.clear();
    argument_names_.clear();
    auto fresh = std::make_unique<Function>();
    function_ = fresh.get();
    registers_ = kTrue + 1;
    if (!kernel && peek() == "(") function_->results = parameters(false);
    const std::string name = next();
    if (peek() == "(") function_->parameters = parameters(kernel);
    if (accept(";")) {  // declared, and defined later
      program_.functions.try_emplace(name, std::move(fresh));
      return;
    }
    while (peek() != "{") {
      const std::string directive = next();
      const int first = std::stoi(next());
      int threads = first;
      while (accept(",")) threads *= std::stoi(next());
      if (directive == ".maxntid") function_->max_threads = threads;
      else if (directive != ".minnctapersm") refuse("`" + directive + "` is not known");
    }
    auto& place = program_.functions[name];
    if (place) {  // keeps the address that calls have taken
      *place = std::move(*fresh);
      function_ = place.get();
    } else {
      place = std::move(fresh);
    }
    body();
    for (const auto& [instruction, label] : jumps_) {
      if (!labels_.count(label)) refuse("no label `" + label + "`");
      function_->code[instruction].target = labels_[label];
    }
    number_registers(*function_, registers_, constants_);
  }

  std::vector<uint32_t> parameters(bool kernel) {
    std::vector<uint32_t> registers;
    size_t& bytes = function_->argument_bytes;
    expect("(");
    while (!accept(")")) {
      expect(".param");
      size_t alignment = 0;
      if (accept(".align")) alignment = std::stoul(next());
      size_t size = bytes_of(next());
      alignment = alignment ? alignment : size;
      const std::string name = next();
      if (accept("[")) {
        size *= std::stoul(next());
        expect("]");
      }
      if (kernel) {
        bytes = round_up(bytes, alignment);
        argument_names_[name] = bytes;
        bytes += size;
      } else {
        registers.push_back(slot(name));
      }
      accept(",");
    }
    return registers;
  }

  uint32_t fresh_register() { return registers_++; }

  uint32_t slot(const std::string& name) {
    const uint32_t index = fresh_register();
    scopes_.back()[name] = {index, true};
    return index;
  }

  void body() {
    expect("{");
    while (!scopes_.empty()) {
      const std::string word = peek();
      if (word == ".loc") skip_line();
      else if (word == ".pragma")
        while (next() != ";") continue;
      else if (accept("{")) scopes_.emplace_back();
      else if (accept("}")) scopes_.pop_back();
      else if (word == ".reg") registers();
      else if (word == ".shared") next(), variable(true, false);
      else if (word == ".param") next(), next(), slot(next()), expect(";");
      else if (peek(1) == ":") label();
      else statement();
    }
  }

  void label() {
    const std::string name = next();
    expect(":");
    if (!labels_.emplace(name, function_->code.size()).second) refuse("a second label `" + name + "` in one function");
  }

  void registers() {
    next();
    next();
    do {
      const std::string name = next();
      if (accept("<")) {
        const int count = std::stoi(next());
        for (int i = 0; i < count; ++i) scopes_.back()[name + std::to_string(i)] = {fresh_register(), false};
        expect(">");
      } else {
        scopes_.back()[name] = {fresh_register(), false};
      }
    } while (accept(","));
    expect(";");
  }

  // Registers lie on the stack of the thread.
  void check_calls(const std::string& name, const Function& function) const {
    size_t most = 0;
    for (const Call& call : function.calls) {
      if (call.callee->code.empty()) refuse("`" + name + "` calls a function that is not defined");
      if (!call.callee->calls.empty()) refuse("calls in a function that is called are not known");
      if (call.arguments.size() != call.callee->parameters.size()) refuse("a call with another number of arguments");
      if (call.results.size() != call.callee->results.size()) refuse("a call with another number of results");
      most = std::max(most, size_t(call.callee->registers));
    }
    if ((function.registers + most) * sizeof(uint64_t) > Stacks::kBytes / 4 * 3) {
      refuse("`" + name + "` has more registers than a thread's stack holds");
    }
  }

  // --- instructions --------------------------------------------------------------------------------------------------
  void statement() {
    uint32_t guard = kTrue;
    bool expected = true;
    const uint32_t first_line = line();
    if (accept("@")) {
      expected = !accept("!");
      guard = named(next())->registers[0];
    }
    const std::string opcode = next();
    Instruction made = opcode.rfind("call", 0) == 0 ? call() : with_operands(opcode);
    made.guard = guard;
    made.expected = expected;
    made.line = first_line;
    function_->code.push_back(made);
  }

  Instruction with_operands(const std::string& opcode) {
    std::vector<Operand> operands;
    while (!accept(";")) {
      operands.push_back(operand());
      while (accept("|")) append(operands.back(), operand());
      if (peek() != ";") expect(",");
    }
    std::string shape;
    for (const Operand& each : operands) shape += std::to_string(each.registers.size());
    if (std::any_of(operands.begin(), operands.end(), [](const Operand& each) { return each.slot; })) {
      return between_slot_and_register(opcode, operands);
    }
    Instruction made;
    try {
      made = instruction(opcode, shape);
    } catch (const Violation& unknown) {
      refuse(unknown.what());
    }
    for (const Operand& each : operands) {
      if (!each.symbol.empty()) jumps_.emplace_back(function_->code.size(), each.symbol);
      if (each.offset && made.space == Space::none) refuse("`" + opcode + "` is not known with an offset");
      made.offset += each.offset;
      for (uint32_t index : each.registers) made.registers[made.count++] = index;
    }
    if (made.space == Space::none && !operands.empty()) made.elements = uint32_t(operands[0].registers.size());
    return made;
  }

  // A parameter of a call is stored or loaded: one register moves to another.
  Instruction between_slot_and_register(const std::string& opcode, const std::vector<Operand>& operands) {
    const std::string type = opcode.substr(opcode.size() - 2);
    const bool whole = operands.size() == 2 && operands[0].offset + operands[1].offset == 0 &&
                       operands[0].registers.size() + operands[1].registers.size() == 2 &&
                       (type == "32" || type == "64");
    if (!whole || opcode.rfind(operands[0].slot ? "st.param." : "ld.param.", 0) != 0) {
      refuse("`" + opcode + "` is not known for a parameter of a call");
    }
    Instruction made = instruction("mov.b64", "11");
    made.registers = {operands[0].registers[0], operands[1].registers[0]};
    made.count = 2;
    return made;
  }

  void append(Operand& operand, const Operand& more) const {
    if (!more.symbol.empty()) refuse("`" + more.symbol + "` is no register");
    operand.registers.insert(operand.registers.end(), more.registers.begin(), more.registers.end());
  }

  Instruction call() {
    Call made{};
    const auto list = [&](std::vector<uint32_t>& registers) {
      expect("(");
      for (; !accept(")"); accept(",")) registers.push_back(named(next())->registers[0]);
    };
    if (peek() == "(") list(made.results), expect(",");
    auto& callee = program_.functions[next()];
    if (!callee) refuse("a call of a function that is not declared before");
    made.callee = callee.get();
    if (accept(",")) list(made.arguments);
    expect(";");
    Instruction made_instruction = instruction("call", "");
    made_instruction.target = uint32_t(function_->calls.size());
    function_->calls.push_back(std::move(made));
    return made_instruction;
  }

  Operand operand() {
    if (accept("{")) {
      Operand vector;
      for (; !accept("}"); accept(",")) append(vector, operand());
      return vector;
    }
    if (accept("[")) {
      Operand address = operand();
      if (accept("+")) address.offset = integer();
      expect("]");
      return address;
    }
    if (peek() == "-" || std::isdigit(static_cast<unsigned char>(peek()[0]))) return {{literal()}, 0, false, {}};
    const std::string name = next();
    if (const std::optional<Operand> known = named(name)) return *known;
    return {{}, 0, false, name};
  }

  // A register, a slot, or a variable, whose address it means.
  std::optional<Operand> named(const std::string& name) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return Operand{{found->second.first}, 0, found->second.second, {}};
    }
    if (const auto found = argument_names_.find(name); found != argument_names_.end()) {
      const uint32_t index = fresh_register();
      function_->arguments.emplace_back(index, found->second);
      return Operand{{index}, 0, false, {}};
    }
    if (const auto found = globals_.find(name); found != globals_.end())
      return Operand{{constant(found->second)}, 0, false, {}};
    if (const auto found = kSpecial.find(name); found != kSpecial.end()) {
      const uint32_t index = fresh_register();
      function_->special.emplace_back(index, found->second);
      scopes_.front()[name] = {index, false};
      return Operand{{index}, 0, false, {}};
    }
    if (name == "WARP_SZ") return Operand{{constant(32)}, 0, false, {}};
    if (name[0] == '%') refuse("the register `" + name + "` is not known");
    return std::nullopt;
  }

  uint32_t constant(uint64_t value) {
    const auto found = constants_.find(value);
    if (found != constants_.end()) return found->second;
    return constants_[value] = fresh_register();
  }

  int64_t integer() {
    const bool negative = accept("-");
    const std::string word = next();
    size_t read = 0;
    const uint64_t magnitude = std::stoull(word, &read, 0);
    if (read != word.size() && word.substr(read) != "U") refuse("the number `" + word + "` is not known");
    return int64_t(negative ? -magnitude : magnitude);
  }

  uint32_t literal() {
    const std::string& text = peek();
    if (text.size() > 2 && text[0] == '0' && (text[1] == 'f' || text[1] == 'd')) {  // a float's or double's bits
      return constant(std::stoull(next().substr(2), nullptr, 16));
    }
    return constant(uint64_t(integer()));
  }

  Program& program_;
  size_t image_end_ = 0, shared_end_ = 0;
  std::vector<SharedVariable> shared_;
  std::map<std::string, uint64_t> globals_;  // addresses: in shared memory, from its start

  Function* function_ = nullptr;  // the one that is read
  uint32_t registers_ = 0;
  std::vector<std::map<std::string, std::pair<uint32_t, bool>>> scopes_;  // registers, and whether they are slots
  std::map<uint64_t, uint32_t> constants_;
  std::map<std::string, size_t> argument_names_;
  std::map<std::string, uint32_t> labels_;
  std::vector<std::pair<size_t, std::string>> jumps_;
};

}  // namespace

Program::Program(const std::string& path, const std::string& text) {
  constexpr size_t kConstantBytes = 64 * 1024;
  image.resize(std::count(text.begin(), text.end(), '\n') + kConstantBytes);
  module.path = path;
  module.begin = reinterpret_cast<uintptr_t>(image.data());
  module.end = module.begin + image.size();
  module.shared_block = reinterpret_cast<uintptr_t>(shared.get());
  Reader(*this, text);
}

}  // namespace cuda_host::ptx
