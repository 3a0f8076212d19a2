// A stack to run on, and the switch from one to another: by hand on x86-64 (ten times as fast: ucontext asks the system
// for the signal mask at every switch), with ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace riskmap::cuda_on_host {

#if defined(__x86_64__)

// Pushes what a function must preserve, stores the stack pointer in *from and goes on where `to` was stored.
extern "C" void riskmap_cuda_on_host_switch(void** from, void* to);
asm(R"(
.text
.hidden riskmap_cuda_on_host_switch
.globl riskmap_cuda_on_host_switch
.type riskmap_cuda_on_host_switch, @function
riskmap_cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size riskmap_cuda_on_host_switch, . - riskmap_cuda_on_host_switch
)");

class Context {
 public:
  // The first switch to it calls entry(), which must not return.
  void start(void* stack, size_t size, void (*entry)()) {
    auto* top = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15});
    *--top = 0;  // where entry() would return to
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    pointer_ = top;
  }

  static void swap(Context& from, Context& to) { riskmap_cuda_on_host_switch(&from.pointer_, to.pointer_); }

 private:
  void* pointer_ = nullptr;
};

#else

class Context {
 public:
  void start(void* stack, size_t size, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }

  static void swap(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace riskmap::cuda_on_host
