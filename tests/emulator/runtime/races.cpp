// What a checked build adds: every access of a kernel comes to access(), which knows what it
// may touch, what has been written, and in which order.
//
// The order is happens-before, as PTX's memory model has it: every thread has a vector clock,
// advanced when it publishes (arrives at a barrier, at __syncwarp) and joined when it learns
// (leaves one). Between blocks a thread publishes by an atomic what it knew at its last fence,
// of other threads too, and learns by a fence what was published where its atomics have been.
// An access races with an earlier one that its thread's clock does not know.

#include <algorithm>

#include "memory.h"

namespace emulator {

static bool is_checked = false;
bool checked() { return is_checked; }
void set_checked() { is_checked = true; }

static void join(Clock& to, const Clock& from) {
  to.resize(std::max(to.size(), from.size()));
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

static void join(SharedClocks& to, const SharedClocks& from) {
  if (!from || from == to) return;
  if (!to) {
    to = from;
    return;
  }
  auto both = std::make_shared<Clocks>(*to);
  for (const auto& [block, clock] : *from) join((*both)[block], clock);
  to = std::move(both);
}

void Block::publish(View& view, Thread& thread) {
  if (!checked()) return;
  join(view.own, thread.view.own);
  join(view.others, thread.view.others);
  ++thread.view.own[thread.number];
}

void Block::learn(const View& view, Thread& thread) {
  if (!checked()) return;
  join(thread.view.own, view.own);
  join(thread.view.others, view.others);
}

// ---- between blocks --------------------------------------------------------------------------

static void learn_what_was_heard() {
  Thread& self = *current;
  join(self.view.others, self.heard);
  self.heard = nullptr;
}

void fence() {
  if (!checked()) return;
  learn_what_was_heard();
  Thread& self = *current;
  auto all =
      self.view.others ? std::make_shared<Clocks>(*self.view.others) : std::make_shared<Clocks>();
  (*all)[block->number] = self.view.own;
  self.fenced = std::move(all);
  ++self.view.own[self.number];
}

static void meet_others(const void* address, bool publish) {
  Thread& self = *current;
  auto& all = block->launch->published;
  const auto published = all.find(address);
  if (published != all.end()) join(self.heard, published->second);
  if (publish && self.fenced) join(all[address], self.fenced);
}

// ---- accesses --------------------------------------------------------------------------------

static bool knows(const View& view, const Access& other) {
  const auto covers = [&](const Clock& clock) {
    return other.time == 0 || (other.thread < clock.size() && clock[other.thread] >= other.time);
  };
  if (other.block == block->number) return covers(view.own);
  if (other.time == 0 || !view.others) return other.time == 0;
  const auto found = view.others->find(other.block);
  return found != view.others->end() && covers(found->second);
}

std::string Block::author(const Access& access) const {
  const std::string where = "block " + std::to_string(access.block) + ", ";
  if (access.thread < count) return where + "thread " + std::to_string(access.thread);
  const uint32_t beyond = access.thread - count;
  if (beyond < kMostWarps) return where + "wgmma of warp " + std::to_string(beyond);
  if (beyond < kMostWarps + kMostMbarriers) return where + "TMA";
  return where + "TMA for thread " + std::to_string(beyond - kMostWarps - kMostMbarriers);
}

// `buffer`: of which the cells are, or null for shared memory.
static void track(Cell* cells, const Buffer* buffer, size_t offset, size_t bytes, bool write,
                  bool atomic, void* call_site) {
  const Thread& self = *current;
  const uint32_t launch = block->launch->id;
  const Access now{block->number, self.view.own[self.number], static_cast<uint16_t>(self.number)};
  const char* const what = write ? "write" : "read";
  const auto place = [&](size_t cell) {
    const std::string memory =
        buffer ? "a tensor's storage of " + std::to_string(buffer->bytes) + " bytes"
               : "shared memory";
    return "byte " + std::to_string(cell * 2) + " of " + memory;
  };
  const auto check_order = [&](size_t cell, const Access& other, const char* others) {
    if (knows(self.view, other)) return;
    fail_at(call_site, "race: %s of %s, not ordered after the %s by %s", what, place(cell).c_str(),
            others, block->author(other).c_str());
  };
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Cell& cell = cells[i];
    if (cell.launch != launch) cell = Cell{};
    cell.launch = launch;
    if (cell.in_flight)
      fail_at(call_site, "%s of %s while a copy by %s is under way", what, place(i).c_str(),
              block->author(cell.writer).c_str());
    if (!write && !buffer && !cell.initialised)
      fail_at(call_site, "read of %s, which has not been written", place(i).c_str());
    if (!(atomic && cell.atomic)) check_order(i, cell.writer, "write");
    if (write) {
      for (const Access& reader : cell.reader) check_order(i, reader, "read");
      cell = Cell{now, {}, launch, true, false, atomic, false};
      continue;
    }
    if (atomic) continue;
    // Of the readers two are remembered: this one, and the last that was another.
    if (cell.reader[0].thread != now.thread || cell.reader[0].block != now.block)
      cell.reader[1] = cell.reader[0];
    cell.reader[0] = now;
  }
}

void Block::track_shared(size_t offset, size_t bytes, bool write, bool atomic, void* call_site) {
  track(cells.data(), nullptr, offset, bytes, write, atomic, call_site);
}

void Block::begin_copy(uint32_t target, size_t bytes, void* call_site) {
  char* const data = shared_pointer(target, bytes, "cp.async", call_site);
  check_products(target, bytes, "cp.async", call_site);
  if (checked()) {
    const size_t offset = shared_offset(target);
    track_shared(offset, bytes, true, false, call_site);
    for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) cells[i].in_flight = true;
  }
  std::fill_n(data, bytes, '\xff');
}

void Block::end_copy(uint32_t target, size_t bytes, const Thread& thread) {
  if (!checked()) return;
  const size_t offset = shared_offset(target);
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    cells[i].in_flight = false;
    cells[i].writer.time = thread.view.own[thread.number];
  }
}

// ---- the async proxy: TMA and wgmma ---------------------------------------------------------
//
// It sees what a thread wrote once that thread has fenced, and the one that starts the reading
// has learned of the fence. What TMA wrote it sees without one.

// The current thread starts something that reads; `reader`: what will have read, or null.
void Block::async_read(uint32_t address, size_t bytes, const Access* reader, const char* what,
                       void* call_site) {
  const size_t offset = shared_offset(address);
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Cell& cell = cells[i];
    if (cell.launch != launch->id || !cell.initialised)
      fail_at(call_site, "%s reads byte %zu of shared memory, which has not been written", what,
              i * 2);
    check_async(cell, i, what, call_site);
    if (reader) cell.reader[1] = cell.reader[0], cell.reader[0] = *reader;
  }
}

void Block::check_async(const Cell& cell, size_t i, const char* what, void* call_site) const {
  const View& view = current->view;
  if (cell.in_flight)
    fail_at(call_site, "%s touches byte %zu of shared memory while a copy by %s is under way", what,
            i * 2, author(cell.writer).c_str());
  if (!knows(view, cell.writer))
    fail_at(call_site, "race: %s, byte %zu of shared memory, not ordered after the write by %s",
            what, i * 2, author(cell.writer).c_str());
  if (cell.async || cell.writer.time == 0) return;
  const auto& fences = threads[cell.writer.thread].proxy_fences;
  const auto fence = std::lower_bound(fences.begin(), fences.end(), cell.writer.time);
  if (fence == fences.end() || *fence >= view.own[cell.writer.thread])
    fail_at(call_site,
            "%s, byte %zu of shared memory: no fence.proxy.async after the write by %s that this"
            " thread knows of",
            what, i * 2, author(cell.writer).c_str());
}

void Block::async_write(uint32_t address, size_t bytes, Access writer, const char* what,
                        void* call_site) {
  const size_t offset = shared_offset(address);
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Cell& cell = cells[i];
    if (cell.launch != launch->id) cell = Cell{};
    check_async(cell, i, what, call_site);
    for (const Access& reader : cell.reader)
      if (!knows(current->view, reader))
        fail_at(call_site, "race: %s, byte %zu of shared memory, not ordered after the read by %s",
                what, i * 2, author(reader).c_str());
    cell = Cell{writer, {}, launch->id, true, true, false, true};
  }
}

void Block::end_async_write(uint32_t address, size_t bytes) {
  const size_t offset = shared_offset(address);
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) cells[i].in_flight = false;
}

void access(const void* pointer, size_t bytes, bool write, bool atomic, void* call_site) {
  if (!current) return;
  Block& b = *block;
  const char* const address = static_cast<const char*>(pointer);
  const auto offset_in = [&](const char* begin) { return static_cast<size_t>(address - begin); };
  const char* const what = atomic ? "atomic" : write ? "write" : "read";
  if (atomic && reinterpret_cast<uintptr_t>(pointer) % bytes)
    fail_at(call_site, "misaligned atomic of %zu bytes at %p", bytes, pointer);
  if (!checked()) return;
  if (offset_in(current->stack) < Block::kStack) return;
  if (offset_in(b.smem) < b.smem_capacity) {
    if (offset_in(b.smem) + bytes > b.smem_bytes)
      fail_at(call_site, "%s of byte %zu of dynamic shared memory, of which there are %zu", what,
              offset_in(b.smem), b.smem_bytes);
    return b.track_shared(offset_in(b.smem), bytes, write, atomic, call_site);
  }
  Launch& launch = *b.launch;
  if (offset_in(launch.static_smem) < launch.static_smem_bytes)
    return b.track_shared(b.smem_capacity + offset_in(launch.static_smem), bytes, write, atomic,
                          call_site);
  if (b.on_a_stack(address)) fail_at(call_site, "%s of another thread's local memory", what);
  if (Buffer* buffer = find_buffer(address)) {
    if (offset_in(buffer->data) + bytes > buffer->bytes)
      fail_at(call_site, "%s of %zu bytes across the end of a tensor's storage of %zu bytes", what,
              bytes, buffer->bytes);
    track(cells_of(*buffer), buffer, offset_in(buffer->data), bytes, write, atomic, call_site);
    if (atomic) meet_others(pointer, write);
    return;
  }
  if (!write && offset_in(static_cast<const char*>(launch.arguments)) < launch.argument_bytes)
    return;
  if (!write && address >= launch.library_begin && address < launch.library_end) return;
  fail_at(call_site, "%s of %zu bytes at %p, which is no device memory (%s)", what, bytes, pointer,
          nearest_buffer(address).c_str());
}

uint32_t ld_acquire(const uint32_t* flag) {
  void* const call_site = EMULATOR_CALL_SITE;
  pause();
  access(flag, 4, false, true, call_site);
  if (checked()) learn_what_was_heard();
  return *flag;
}

void st_release(uint32_t* flag, uint32_t value) {
  fence();
  access(flag, 4, true, true, EMULATOR_CALL_SITE);
  *flag = value;
}

}  // namespace emulator
