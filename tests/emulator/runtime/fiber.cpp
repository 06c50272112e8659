// Threads as fibers: a stack each, and a switch between two of them.

#include <sys/mman.h>

#include <new>

#include "block.h"

#ifndef __x86_64__
#error "the emulator switches fibers in x86-64 assembly; another machine needs its own few lines"
#endif

asm(R"(
.text
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
.section .note.GNU-stack, "", @progbits
.text
)");

namespace emulator {

Thread* current = nullptr;
Block* block = nullptr;

static void run_thread() {
  const Launch& launch = *block->launch;
  launch.entry(launch.arguments);
  block->exit_thread();
}

// A page that cannot be touched lies below every stack.
void Block::reserve_stacks(size_t wanted) {
  if (wanted > stack_count) {
    if (stacks) munmap(stacks, stack_count * kStackStride);
    stack_count = wanted;
    void* mapped = mmap(nullptr, stack_count * kStackStride, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    stacks = static_cast<char*>(mapped);
    for (size_t i = 0; i < stack_count; ++i) mprotect(stacks + i * kStackStride, kPage, PROT_NONE);
  }
  for (uint32_t i = 0; i < wanted; ++i) {
    Thread& thread = threads[i];
    thread.stack = stacks + i * kStackStride + kPage;
    // Stacks that all begin alike would fight for the same lines of the cache.
    auto** top = reinterpret_cast<void**>(thread.stack + kStack - i % 61 * 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(run_thread);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    thread.stack_pointer = top;
  }
}

Block::Block() {
  void* mapped = mmap(nullptr, kMaxSmem + 2 * kPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  smem_mapping = static_cast<char*>(mapped);
  mprotect(smem_mapping, kPage, PROT_NONE);
  mprotect(smem_mapping + kPage + kMaxSmem, kPage, PROT_NONE);
  smem = smem_mapping + kPage + kMaxSmem;
}

Block::~Block() {
  if (stacks) munmap(stacks, stack_count * kStackStride);
  munmap(smem_mapping, kMaxSmem + 2 * kPage);
}

}  // namespace emulator
