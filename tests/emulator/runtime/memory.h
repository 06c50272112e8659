// The buffers that kernels may use, for memory.cpp and races.cpp.
#pragma once

#include "block.h"

namespace emulator {

struct Buffer {
  char* data;
  size_t bytes;
  char* mapping;
  size_t mapped;
  size_t margin_before = 0, margin_after = 0;  // bytes that must stay as they were filled
  Cell* cells = nullptr;                       // in checked builds; see cells_of

  bool holds(const char* address) const { return static_cast<size_t>(address - data) < bytes; }
};

Buffer* find_buffer(const char* address);
Cell* cells_of(Buffer& buffer);  // one for two bytes
void check_margins(const char* kernel);

}  // namespace emulator
