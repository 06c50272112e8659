// TMA: boxes of a tensor, to and from shared memory, in pieces of a row.
//
// A load's target is NaN from the issue on; rows land at once, at any moment, or when no thread
// of the block can go on. A store reads its source when a wait for that demands it, or before,
// and writes when a wait for that demands it, or before.

#include "bulk_copy.h"

#include <cstring>

#include "memory.h"

namespace emulator {

// Copies between a row's bytes, in order, and their swizzled places in shared memory.
template <class Copy>
static void each_chunk(const Box& box, uint32_t row, Copy copy) {
  const uint32_t bytes = box.map.row_bytes(), begin = box.shared + row * bytes;
  for (uint32_t i = 0; i < bytes; i += 16)
    copy(box.map.swizzled ? swizzle128(begin + i) : begin + i, i);
}

// The parts of the tensor that the box has must be a tensor's of ours.
static void check_box(const Box& box, bool write) {
  if (box.shared % (box.map.swizzled ? 1024 : 128))
    fail_at(box.call_site, "TMA: 0x%x is not a multiple of %d", box.shared,
            box.map.swizzled ? 1024 : 128);
  for (uint32_t row = 0; row < box.map.rows(); ++row) {
    const RowOfBox part = row_of(box, row);
    if (!part.data) continue;
    const Buffer* buffer = find_buffer(part.data);
    if (!buffer || !buffer->holds(part.data + part.bytes - 1))
      fail_at(box.call_site, "TMA %s %u bytes at %p, out of bounds: %s", write ? "writes" : "reads",
              part.bytes, static_cast<void*>(part.data), nearest_buffer(part.data).c_str());
    access(part.data, part.bytes, write, false, box.call_site);
  }
}

// ---- loads ---------------------------------------------------------------------------------

void tma_load(uint32_t target, const CUtensorMap& map, uint32_t barrier, const int* at, int dims) {
  void* const call_site = EMULATOR_CALL_SITE;
  Block& b = *block;
  BoxLoad load{};
  load.map = decode(map, dims, call_site);
  std::copy_n(at, dims, load.at);
  load.shared = target;
  load.barrier = barrier;
  load.call_site = call_site;
  const uint32_t bytes = load.map.bytes();
  char* const data = b.shared_pointer(target, bytes, "TMA", call_site);
  const Mbarrier& counted = b.mbarrier_at(barrier, "TMA", call_site);
  if (!counted.fenced)
    fail_at(call_site, "TMA: no fence of its initialisation since the mbarrier at 0x%x was made",
            barrier);
  check_box(load, false);
  b.check_products(target, bytes, "TMA", call_site);
  if (checked())
    b.async_write(target, bytes, {b.number, counted.phase + 1, b.loads_of(counted)}, "TMA",
                  call_site);
  std::fill_n(data, bytes, '\xff');
  load.first = b.launch->seed ? b.random() % load.map.rows() : 0;
  b.loads.push_back(load);
  if (b.launch->delivery == kEager) b.deliver_rows(b.loads.back(), load.map.rows());
}

void Block::deliver_rows(BoxLoad& load, uint32_t rows) {
  const uint32_t all = load.map.rows(), bytes = load.map.row_bytes();
  for (; rows && load.delivered < all; --rows) {
    const uint32_t row = (load.first + load.delivered++) % all;
    char held[512] = {};
    const RowOfBox part = row_of(load, row);
    if (part.data) std::memcpy(held + part.offset, part.data, part.bytes);
    each_chunk(load, row, [&](uint32_t address, uint32_t i) {
      std::memcpy(shared_pointer(address, 16, "TMA", load.call_site), held + i, 16);
    });
    if (load.delivered == all && checked()) end_async_write(load.shared, load.map.bytes());
    Mbarrier& barrier = mbarriers.at(load.barrier);
    barrier.bytes -= bytes;
    settle(barrier);
  }
  if (load.delivered < all) return;
  std::swap(load, loads.back());
  loads.pop_back();
}

// Of the loads that are on their way; false: there are none.
bool Block::deliver_a_row() {
  if (loads.empty()) return false;
  deliver_rows(loads[launch->seed ? random() % loads.size() : 0], 1);
  return true;
}

// ---- stores --------------------------------------------------------------------------------

void tma_store(const CUtensorMap& map, uint32_t source, const int* at, int dims) {
  void* const call_site = EMULATOR_CALL_SITE;
  Block& b = *block;
  Thread& self = *current;
  BoxStore store{};
  store.map = decode(map, dims, call_site);
  std::copy_n(at, dims, store.at);
  store.shared = source;
  store.call_site = call_site;
  store.group = self.store_group;
  b.shared_pointer(source, store.map.bytes(), "TMA", call_site);
  check_box(store, true);
  if (checked()) {
    const Access reader{b.number, self.store_group + 1, b.stores_of(self)};
    b.async_read(source, store.map.bytes(), &reader, "TMA", call_site);
  }
  self.stores.push_back(std::move(store));
  if (b.launch->delivery == kEager) {
    b.read_source(self.stores.back());
    b.write_target(self.stores.back());
  }
}

void Block::read_source(BoxStore& store) {
  store.held.resize(store.map.bytes());
  for (uint32_t row = 0; row < store.map.rows(); ++row)
    each_chunk(store, row, [&](uint32_t address, uint32_t i) {
      std::memcpy(&store.held[row * store.map.row_bytes() + i],
                  shared_pointer(address, 16, "TMA", store.call_site), 16);
    });
  store.read = true;
}

void Block::write_target(BoxStore& store) {
  for (uint32_t row = 0; row < store.map.rows(); ++row) {
    const RowOfBox part = row_of(store, row);
    if (part.data)
      std::memcpy(part.data, &store.held[row * store.map.row_bytes() + part.offset], part.bytes);
  }
}

void tma_store_commit() { ++current->store_group; }

void tma_store_wait(int groups, bool only_read) {
  Block& b = *block;
  Thread& self = *current;
  const auto waited_for = [&](const BoxStore& store) {
    return store.group + groups < self.store_group;
  };
  for (BoxStore& store : self.stores)
    if (waited_for(store) && !store.read) b.read_source(store);
  if (self.store_group > static_cast<uint32_t>(groups))
    self.stores_read = std::max(self.stores_read, self.store_group - groups);
  if (checked()) {
    const size_t stores = b.stores_of(self);
    self.view.own.resize(std::max(self.view.own.size(), stores + 1));
    self.view.own[stores] = self.stores_read;
  }
  if (!only_read) {
    size_t kept = 0;
    for (BoxStore& store : self.stores) {
      if (waited_for(store)) {
        b.write_target(store);
      } else {
        if (&self.stores[kept] != &store) self.stores[kept] = std::move(store);
        ++kept;
      }
    }
    self.stores.resize(kept);
  }
  if (b.launch->seed && b.random.one_in(4)) b.switch_thread();
}

// When a thread exits: shared memory may be another block's from now on.
void Block::check_stores(Thread& thread) {
  for (BoxStore& store : thread.stores) {
    if (store.group >= thread.stores_read)
      fail_at(store.call_site, "exits, and has not waited for TMA to read what it stores");
    write_target(store);
  }
  thread.stores.clear();
}

}  // namespace emulator
