// Items of work, taken by whichever thread is free.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/memory.h"

namespace moe_ext::cpu {

// Below this many multiplications, waking other threads costs more than they bring.
constexpr int64_t kSerialWork = 1 << 18;

// body(pieces, item) for every item; carve(Scratch&) takes a thread's pieces of scratch memory.
// Items of `work` multiplications together; none may write what another one writes.
template <class Carve, class Body>
void for_items(int64_t items, int64_t work, Carve carve, Body body) {
  std::atomic<int64_t> next{0};
  const auto worker = [&] {
    const Workspace<char> memory(bytes_of(carve));
    Scratch scratch{memory.data()};
    const auto pieces = carve(scratch);
    for (int64_t i = next++; i < items; i = next++) body(pieces, i);
  };
  const int64_t threads = std::min<int64_t>(items, at::get_num_threads());
  if (threads <= 1 || work < kSerialWork) {
    worker();
  } else {
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { worker(); });
  }
}

}  // namespace moe_ext::cpu
