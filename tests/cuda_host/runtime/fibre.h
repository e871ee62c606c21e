// Fibres: stacks of their own, switched by hand. swapcontext asks the kernel for the signal mask twice a switch, which
// costs 50 times as much.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_host {

struct Fibre {
  void* context = nullptr;  // where it goes on: a stack pointer on x86-64, a ucontext_t* elsewhere
};

// Suspends `from`, which is running, and continues `to`.
extern "C" void cuda_host_switch(Fibre* from, const Fibre* to);

// Gives `fibre` a start: `entry` on the stack that ends at `stack_high`. `entry` must not return.
void start(Fibre& fibre, uintptr_t stack_low, uintptr_t stack_high, void (*entry)());

// Stacks side by side, each above a page that faults; memory is taken from the system as it is touched.
class Stacks {
 public:
  static constexpr size_t kBytes = 128 * 1024;  // a kernel's arguments alone may take 32
  ~Stacks();
  void reserve(size_t count);
  uintptr_t low(size_t i) const { return base_ + i * kBytes + kGuard; }
  // Staggered by a cache line each: tops at one distance of 128 KiB would all share a few sets of the caches.
  uintptr_t high(size_t i) const { return base_ + (i + 1) * kBytes - i % 256 * 64; }

 private:
  static constexpr size_t kGuard = 4096;
  uintptr_t base_ = 0;
  size_t count_ = 0;
};

}  // namespace cuda_host
