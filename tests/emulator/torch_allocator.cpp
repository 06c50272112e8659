// Every tensor's memory comes from the emulator, between pages that cannot be touched.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include "emulator.h"

namespace {

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? emulator::allocate(bytes) : nullptr;
    return {data, data, &free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

 private:
  static void free(void* data) {
    if (data) emulator::release(data);
  }
};

// Never destroyed: tensors may outlive every static object.
[[maybe_unused]] const bool installed = [] {
  c10::SetCPUAllocator(new GuardedAllocator, /*priority=*/100);
  return true;
}();

}  // namespace
