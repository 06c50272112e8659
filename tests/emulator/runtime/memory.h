// The buffers that kernels may use, for memory.cpp and races.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "block.h"

namespace emulator {

// Who wrote two bytes of global memory last (races.cpp).
struct Writer {
  uint32_t launch = 0, block = 0, epoch = 0;
};

struct Buffer {
  char* data;
  size_t bytes;
  char* mapping;
  size_t mapped;
  size_t margin_before = 0, margin_after = 0;  // bytes that must stay as they were filled
  std::vector<Writer> writers;                 // one for two bytes, in checked builds

  bool holds(const char* address) const { return static_cast<size_t>(address - data) < bytes; }
};

Buffer* find_buffer(const char* address);
void check_margins(const char* kernel);

}  // namespace emulator
