// Runs functions: control, memory, and meetings with other threads, whose checks are those of the C++ kernels.
#include <alloca.h>

#include <fstream>
#include <sstream>

#include "access.h"
#include "grid.h"
#include "ptx.h"
#include "report.h"

namespace cuda_host::ptx {

bool execute = false;

namespace {

std::map<std::pair<std::string, int>, std::unique_ptr<Program>> programs;  // by path and architecture
std::map<std::pair<const void*, int>, Kernel> kernels;

Site site(const Instruction& i) { return {grid->module->path.c_str(), int(i.line)}; }

// What stands for the code of an instruction: a byte of the module's image, and where a call there would return to.
const void* code_of(const Instruction& i) { return reinterpret_cast<const void*>(grid->module->begin + i.line + 1); }

void run(Frame& frame) {
  const Instruction* end = frame.function.code.data() + frame.function.code.size();
  while (frame.next != end) {
    const Instruction& i = *frame.next++;
    if ((frame.registers[i.guard] != 0) == i.expected) i.execute(frame, i);
  }
}

// --- control ---------------------------------------------------------------------------------------------------------
void branch(Frame& f, const Instruction& i) { f.next = f.function.code.data() + i.target; }

void leave(Frame& f, const Instruction&) { f.next = f.function.code.data() + f.function.code.size(); }

void call(Frame& f, const Instruction& i) {
  const Call& call = f.function.calls[i.target];
  const Function& callee = *call.callee;
  auto* registers = static_cast<uint64_t*>(alloca(callee.registers * sizeof(uint64_t)));
  std::memcpy(registers, callee.start.data(), callee.start.size() * sizeof(uint64_t));
  for (size_t n = 0; n < call.arguments.size(); ++n) registers[callee.parameters[n]] = f.registers[call.arguments[n]];
  for (const auto& [index, value] : callee.special) registers[index] = value();
  Frame inner{callee, registers, callee.code.data()};
  run(inner);
  for (size_t n = 0; n < call.results.size(); ++n) f.registers[call.results[n]] = registers[callee.results[n]];
}

// --- memory ----------------------------------------------------------------------------------------------------------
uintptr_t shared_address(uint64_t offset) {
  return grid->module->shared.address(uint32_t(offset), current->block->rank);
}

uintptr_t address_of(const Frame& f, const Instruction& i, uint32_t index) {
  const uint64_t value = f.registers[index] + uint64_t(i.offset);
  if (i.space == Space::generic) return value;
  const uintptr_t address = i.space == Space::shared ? shared_address(value) : value;
  uint32_t rank;
  const bool shared = grid->module->shared.offset(address, rank) != SharedMemory::kOutside;
  if (shared != (i.space == Space::shared)) {
    fail(name(*current) + " takes an address " + (shared ? "in" : "outside") + " shared memory (" + hex(address) +
         ") for " + (shared ? "one in global memory" : "one in it") + " at " + name(site(i)));
  }
  return address;
}

// T is the type of an element in memory, and in the register the signed or unsigned number that it is.
template <class T>
void load(Frame& f, const Instruction& i) {
  const uintptr_t address = address_of(f, i, i.registers[i.elements]);
  check_access(address, sizeof(T) * i.elements, false, true, code_of(i));
  for (uint32_t n = 0; n < i.elements; ++n) {
    T value;
    std::memcpy(&value, reinterpret_cast<const void*>(address + n * sizeof value), sizeof value);
    f.set(i.registers[n], int64_t(value));
  }
}

template <class T>
void store(Frame& f, const Instruction& i) {
  const uintptr_t address = address_of(f, i, i.registers[0]);
  check_access(address, sizeof(T) * i.elements, true, true, code_of(i));
  for (uint32_t n = 0; n < i.elements; ++n) {
    const T value = f.get<T>(i.registers[1 + n]);
    std::memcpy(reinterpret_cast<void*>(address + n * sizeof value), &value, sizeof value);
  }
}

void to_generic(Frame& f, const Instruction& i) { f.set(i.registers[0], shared_address(f.registers[i.registers[1]])); }

void keep(Frame& f, const Instruction& i) { f.registers[i.registers[0]] = f.registers[i.registers[1]]; }

// Of a rank that the cluster has not, the address is one that nobody may access: a compiler may ask for it in vain.
void map_rank(Frame& f, const Instruction& i) {
  if (f.get<uint32_t>(i.registers[2]) >= current->block->cluster->blocks.size())
    return f.set(i.registers[0], uint64_t{0});
  const auto* address = reinterpret_cast<const void*>(f.registers[i.registers[1]]);
  f.set(i.registers[0], reinterpret_cast<uintptr_t>(map_shared(address, f.get<uint32_t>(i.registers[2]), site(i))));
}

// The source's size is the whole copy's: cp.async fills what is beyond it with zeros, which nothing here asks for.
void copy(Frame& f, const Instruction& i) {
  const auto bytes = f.get<uint32_t>(i.registers[2]);
  if (i.count == 4 && f.get<uint32_t>(i.registers[3]) != bytes) fail("cp.async with zeros at the end is not known");
  copy_async(shared_address(f.get<uint32_t>(i.registers[0])), f.registers[i.registers[1]], bytes, code_of(i));
}

void commit(Frame&, const Instruction&) { commit_copies(); }

void wait(Frame& f, const Instruction& i) { wait_copies(f.registers[i.registers[0]]); }

// --- meetings --------------------------------------------------------------------------------------------------------
void block_barrier(Frame& f, const Instruction& i) {
  if (f.registers[i.registers[0]] != 0) fail("a barrier of a part of the block is not known");
  sync_block(Vote::none, 0, site(i));
}

void warp_barrier(Frame& f, const Instruction& i) {
  meet_warp(WarpOperation::sync, "__syncwarp", f.get<uint32_t>(i.registers[0]), 0, 0, site(i));
}

void cluster_arrive(Frame&, const Instruction& i) { arrive_cluster(site(i)); }

void cluster_wait(Frame&, const Instruction& i) { wait_cluster(site(i)); }

// Counts the threads of the block whose predicate holds.
void block_count(Frame& f, const Instruction& i) {
  if (f.registers[i.registers[1]] != 0) fail("a barrier of a part of the block is not known");
  f.set(i.registers[0], sync_block(Vote::count, int(f.registers[i.registers[2]]), site(i)));
}

// shfl.sync d|p, a, b, c, mask: the lanes between which a value moves are a segment, c's upper bits; its lower bits are
// the last of them that is read, for `up` the first. A lane that would read outside reads its own value, and p is
// false.
enum class Shuffle { up, down, butterfly, index };
constexpr const char* kShuffles[] = {"__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync", "__shfl_sync"};

template <Shuffle mode>
void shuffle(Frame& f, const Instruction& i) {
  const uint32_t* r = i.registers.data() + i.elements;
  const auto by = f.get<uint32_t>(r[1]) & 31, clamp = f.get<uint32_t>(r[2]);
  const uint32_t lane = current->lane, segment = clamp >> 8 & 31;
  const uint32_t last = (lane & segment) | (clamp & 31 & ~segment);
  int source = 0;
  switch (mode) {
    case Shuffle::up: source = int(lane) - int(by); break;
    case Shuffle::down: source = int(lane + by); break;
    case Shuffle::butterfly: source = int(lane ^ by); break;
    case Shuffle::index: source = int((lane & segment) | (by & ~segment)); break;
  }
  const bool within = mode == Shuffle::up ? source >= int(last) : source <= int(last);
  const uint64_t value = meet_warp(WarpOperation::shuffle, kShuffles[int(mode)], f.get<uint32_t>(r[3]),
                                   f.get<uint32_t>(r[0]), within ? uint32_t(source) : lane, site(i));
  f.set(i.registers[0], value);
  if (i.elements == 2) f.set(i.registers[1], uint64_t(within));
}

uint32_t ballot(const char* what, const Frame& f, const Instruction& i) {
  const bool holds = f.registers[i.registers[1]] != 0;
  return uint32_t(meet_warp(WarpOperation::ballot, what, f.get<uint32_t>(i.registers[2]), holds, 0, site(i)));
}

void vote_ballot(Frame& f, const Instruction& i) { f.set(i.registers[0], uint64_t(ballot("__ballot_sync", f, i))); }

void vote_any(Frame& f, const Instruction& i) { f.set(i.registers[0], uint64_t(ballot("__any_sync", f, i) != 0)); }

void vote_all(Frame& f, const Instruction& i) {
  f.set(i.registers[0], uint64_t(ballot("__all_sync", f, i) == f.get<uint32_t>(i.registers[2])));
}

template <WarpOperation operation>
void reduce(Frame& f, const Instruction& i) {
  const char* what = operation == WarpOperation::add ? "__reduce_add_sync" : "__reduce_max_sync";
  f.set(i.registers[0],
        meet_warp(operation, what, f.get<uint32_t>(i.registers[2]), f.get<uint32_t>(i.registers[1]), 0, site(i)));
}

const std::map<std::string, Operation> kOthers = {
    {"bra", {branch, "0"}},
    {"bra.uni", {branch, "0"}},
    {"ret", {leave, ""}},
    {"call", {call, ""}},
    {"cvta.shared.u64", {to_generic, "11"}},
    {"cvta.to.global.u64", {keep, "11"}},
    {"mapa.u64", {map_rank, "111"}},
    {"cp.async.ca.shared.global", {copy, "111 1111"}},
    {"cp.async.cg.shared.global", {copy, "111 1111"}},
    {"cp.async.commit_group", {commit, ""}},
    {"cp.async.wait_group", {wait, "1"}},
    {"bar.sync", {block_barrier, "1"}},
    {"bar.warp.sync", {warp_barrier, "1"}},
    {"barrier.cluster.arrive", {cluster_arrive, ""}},
    {"barrier.cluster.wait", {cluster_wait, ""}},
    {"bar.red.popc.u32", {block_count, "111"}},
    {"shfl.sync.up.b32", {shuffle<Shuffle::up>, "11111 21111"}},
    {"shfl.sync.down.b32", {shuffle<Shuffle::down>, "11111 21111"}},
    {"shfl.sync.bfly.b32", {shuffle<Shuffle::butterfly>, "11111 21111"}},
    {"shfl.sync.idx.b32", {shuffle<Shuffle::index>, "11111 21111"}},
    {"vote.sync.ballot.b32", {vote_ballot, "111"}},
    {"vote.sync.any.pred", {vote_any, "111"}},
    {"vote.sync.all.pred", {vote_all, "111"}},
    {"redux.sync.add.u32", {reduce<WarpOperation::add>, "111"}},
    {"redux.sync.max.s32", {reduce<WarpOperation::max_signed>, "111"}},
};

const std::map<std::string, std::pair<Execute, Execute>> kTypes = {
    {"b8", {load<uint8_t>, store<uint8_t>}},    {"u8", {load<uint8_t>, store<uint8_t>}},
    {"s8", {load<int8_t>, store<int8_t>}},      {"b16", {load<uint16_t>, store<uint16_t>}},
    {"u16", {load<uint16_t>, store<uint16_t>}}, {"s16", {load<int16_t>, store<int16_t>}},
    {"b32", {load<uint32_t>, store<uint32_t>}}, {"u32", {load<uint32_t>, store<uint32_t>}},
    {"s32", {load<int32_t>, store<int32_t>}},   {"f32", {load<uint32_t>, store<uint32_t>}},
    {"b64", {load<uint64_t>, store<uint64_t>}}, {"u64", {load<uint64_t>, store<uint64_t>}},
    {"s64", {load<uint64_t>, store<uint64_t>}}, {"f64", {load<uint64_t>, store<uint64_t>}},
};

// ld or st, of a space, with hints for the caches, of a vector, of a type; without `execute` where a part is not known.
Instruction memory_access(const std::string& opcode) {
  Instruction made;
  std::stringstream parts(opcode);
  std::string part;
  std::getline(parts, part, '.');
  const bool stores = part == "st";
  if (part != "ld" && !stores) return made;
  made.space = Space::generic;
  while (std::getline(parts, part, '.')) {
    if (const auto type = kTypes.find(part); type != kTypes.end()) {
      made.execute = stores ? type->second.second : type->second.first;
      return made;
    }
    if (part == "global") made.space = Space::global;
    else if (part == "shared") made.space = Space::shared;
    else if (part == "v2") made.elements = 2;
    else if (part == "v4") made.elements = 4;
    else if (part != "const" && part != "param" && part != "wb") return made;
  }
  return made;
}

}  // namespace

Instruction instruction(const std::string& opcode, const std::string& shape) {
  Instruction made = memory_access(opcode);
  const std::string vector = std::to_string(made.elements);
  std::string shapes = opcode[0] == 'l' ? vector + "1" : "1" + vector;
  for (const auto* table : {&arithmetic(), &kOthers}) {
    const auto found = table->find(opcode);
    if (found == table->end()) continue;
    made.execute = found->second.execute;
    shapes = found->second.shapes;
  }
  if (!made.execute) throw Violation("the opcode `" + opcode + "` is not known");
  if ((" " + shapes + " ").find(" " + shape + " ") == std::string::npos) {
    throw Violation("`" + opcode + "` is not known with operands of these numbers of registers: " + shape);
  }
  return made;
}

void run(const void* function, const void* arguments) {
  const auto& kernel = *static_cast<const Function*>(function);
  auto* registers = static_cast<uint64_t*>(alloca(kernel.registers * sizeof(uint64_t)));
  std::memcpy(registers, kernel.start.data(), kernel.start.size() * sizeof(uint64_t));
  for (const auto& [index, offset] : kernel.arguments)
    registers[index] = reinterpret_cast<uintptr_t>(arguments) + offset;
  for (const auto& [index, value] : kernel.special) registers[index] = value();
  Frame frame{kernel, registers, kernel.code.data()};
  run(frame);
}

void declare(int arch, const std::string& path, const std::map<uintptr_t, std::string>& names) {
  auto known = programs.find({path, arch});
  if (known == programs.end()) {
    std::stringstream text;
    text << std::ifstream(path).rdbuf();
    known = programs.emplace(std::pair(path, arch), std::make_unique<Program>(path, text.str())).first;
  }
  Program& program = *known->second;
  for (const auto& [kernel, name] : names) {
    const auto found = program.functions.find(name);
    if (found == program.functions.end()) throw Violation(path + " has no kernel " + name);
    kernels[{reinterpret_cast<const void*>(kernel), arch}] = {&program, found->second.get()};
  }
}

void forget_shared_accesses() {
  for (auto& [key, program] : programs) program->module.shared.forget_accesses();
}

const Kernel* find(const void* kernel, int arch) {
  const auto found = kernels.find({kernel, arch});
  return found == kernels.end() ? nullptr : &found->second;
}

}  // namespace cuda_host::ptx
