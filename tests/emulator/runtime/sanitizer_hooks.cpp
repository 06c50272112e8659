// In a checked build the kernels are compiled with -fsanitize=thread,bounds,shift,alignment,
// and these take the place of the sanitizers' own libraries: the compiler calls one for
// every access, and for what is undefined.

#include <cstdint>

#include "block.h"

using emulator::access;

namespace {
void check_alignment(void* address, unsigned bytes, void* call_site) {
  if (emulator::current && reinterpret_cast<uintptr_t>(address) % bytes)
    emulator::fail_at(call_site, "misaligned access of %u bytes at %p", bytes, address);
}
}  // namespace

#define HOOKS(N)                                          \
  void __tsan_read##N(void* address) {                    \
    check_alignment(address, N, EMULATOR_CALL_SITE);      \
    access(address, N, false, false, EMULATOR_CALL_SITE); \
  }                                                       \
  void __tsan_write##N(void* address) {                   \
    check_alignment(address, N, EMULATOR_CALL_SITE);      \
    access(address, N, true, false, EMULATOR_CALL_SITE);  \
  }                                                       \
  void __tsan_unaligned_read##N(void* address) {          \
    access(address, N, false, false, EMULATOR_CALL_SITE); \
  }                                                       \
  void __tsan_unaligned_write##N(void* address) {         \
    access(address, N, true, false, EMULATOR_CALL_SITE);  \
  }                                                       \
  void __tsan_volatile_read##N(void* address) {           \
    access(address, N, false, true, EMULATOR_CALL_SITE);  \
  }                                                       \
  void __tsan_volatile_write##N(void* address) {          \
    access(address, N, true, true, EMULATOR_CALL_SITE);   \
  }

extern "C" {
void __tsan_init() { emulator::set_checked(); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_read_range(void* address, unsigned long bytes) {
  access(address, bytes, false, false, EMULATOR_CALL_SITE);
}
void __tsan_write_range(void* address, unsigned long bytes) {
  access(address, bytes, true, false, EMULATOR_CALL_SITE);
}

void __ubsan_handle_out_of_bounds(void*, unsigned long index) {
  emulator::fail_at(EMULATOR_CALL_SITE, "index %ld is outside of the array",
                    static_cast<long>(index));
}
void __ubsan_handle_shift_out_of_bounds(void*, unsigned long, unsigned long by) {
  emulator::fail_at(EMULATOR_CALL_SITE, "a shift by %ld", static_cast<long>(by));
}
void __ubsan_handle_type_mismatch_v1(void*, unsigned long pointer) {
  emulator::fail_at(EMULATOR_CALL_SITE, "misaligned or null pointer %p",
                    reinterpret_cast<void*>(pointer));
}
}
