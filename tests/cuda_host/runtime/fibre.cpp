#include "fibre.h"

#include <sys/mman.h>

#include <new>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_host {

#ifdef __x86_64__

// The callee-saved registers of the System V ABI go to the old stack and come from the new one.
asm(R"(
.text
.globl cuda_host_switch
.hidden cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");

void start(Fibre& fibre, uintptr_t, uintptr_t stack_high, void (*entry)()) {
  // Six registers, the address to return to, and one word that leaves the stack as a call would.
  auto** top = reinterpret_cast<void**>(stack_high) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(entry);
  fibre.context = top;
}

#else

extern "C" void cuda_host_switch(Fibre* from, const Fibre* to) {
  ucontext_t here;
  from->context = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to->context));
}

void start(Fibre& fibre, uintptr_t stack_low, uintptr_t stack_high, void (*entry)()) {
  const uintptr_t top = (stack_high - sizeof(ucontext_t)) & ~uintptr_t{63};
  auto* context = new (reinterpret_cast<void*>(top)) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = reinterpret_cast<void*>(stack_low);
  context->uc_stack.ss_size = top - stack_low;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  fibre.context = context;
}

#endif

Stacks::~Stacks() {
  if (count_) munmap(reinterpret_cast<void*>(base_), count_ * kBytes);
}

void Stacks::reserve(size_t count) {
  if (count <= count_) return;
  if (count_) munmap(reinterpret_cast<void*>(base_), count_ * kBytes);
  count_ = 0;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* base = mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  base_ = reinterpret_cast<uintptr_t>(base);
  count_ = count;
  for (size_t i = 0; i < count; ++i) mprotect(reinterpret_cast<void*>(base_ + i * kBytes), kGuard, PROT_NONE);
}

}  // namespace cuda_host
