// cp.async. The target is NaN from the issue on, and becomes what was copied when the
// settings say: at once, at some moment, or when a wait demands it, and not before.

#include <cstring>

#include "block.h"

namespace emulator {

void cp_async(uint32_t target, const void* source, int size, int bytes) {
  void* const call_site = EMULATOR_CALL_SITE;
  Block& b = *block;
  Thread& self = *current;
  if (bytes < 0 || bytes > size)
    fail_at(call_site, "cp.async of %d bytes that reads %d", size, bytes);
  if (target % size)
    fail_at(call_site, "cp.async: the target 0x%x is not a multiple of %d", target, size);
  if (reinterpret_cast<uintptr_t>(source) % size)
    fail_at(call_site, "cp.async: the source %p is not a multiple of %d", source, size);
  if (bytes && checked()) access(source, bytes, false, false, call_site);
  b.begin_copy(target, size, call_site);
  self.copies.push_back({target, source, static_cast<uint16_t>(size), static_cast<uint16_t>(bytes),
                         self.copy_group, false, call_site});
  if (b.launch->delivery == kEager) b.deliver(self.copies.back());
}

void Block::deliver(AsyncCopy& copy) {
  char* target = shared_pointer(copy.target, copy.size, "cp.async", copy.call_site);
  std::memcpy(target, copy.source, copy.bytes);
  std::memset(target + copy.bytes, 0, copy.size - copy.bytes);
  copy.done = true;
}

// Of everything that is under way.
void Block::deliver_some() {
  Thread& thread = threads[random() % count];
  for (AsyncCopy& copy : thread.copies)
    if (!copy.done && random.one_in(2)) deliver(copy);
  if (!loads.empty()) deliver_rows(loads[random() % loads.size()], 1 + random() % 64);
  for (BoxStore& store : thread.stores)
    if (!store.read && random.one_in(2)) read_source(store);
  for (Warp& warp : warps)
    if (random.one_in(2)) multiply_next(warp);
}

void cp_async_commit() { ++current->copy_group; }

void cp_async_wait(int groups) {
  Block& b = *block;
  Thread& self = *current;
  size_t kept = 0;
  for (AsyncCopy& copy : self.copies) {
    if (copy.group + groups < self.copy_group) {
      if (!copy.done) b.deliver(copy);
      b.end_copy(copy.target, copy.size, self);
    } else {
      self.copies[kept++] = copy;
    }
  }
  self.copies.resize(kept);
  if (b.launch->seed && b.random.one_in(4)) b.switch_thread();
}

}  // namespace emulator
