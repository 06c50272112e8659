// What a checked build adds: every access of a kernel comes to access(), which knows what it
// may touch, what has been written, and in which order.
//
// Within a block the order is happens-before: every thread has a vector clock, advanced when
// it publishes (arrives at a barrier, at __syncwarp) and joined when it learns (leaves one).
// An access races with an earlier one that its thread's clock does not know. Between blocks
// the same is done a block at a time: __threadfence ends an epoch, an atomic publishes the
// epochs that have ended and learns what others published there.

#include <algorithm>

#include "memory.h"

namespace emulator {

static bool is_checked = false;
bool checked() { return is_checked; }
void set_checked() { is_checked = true; }

void Block::publish(Clock& clock, Thread& thread) {
  if (!checked()) return;
  clock.resize(count);
  for (uint32_t i = 0; i < count; ++i) clock[i] = std::max(clock[i], thread.clock[i]);
  ++thread.clock[thread.number];
}

void Block::learn(const Clock& clock, Thread& thread) {
  if (!checked()) return;
  for (size_t i = 0; i < clock.size(); ++i) thread.clock[i] = std::max(thread.clock[i], clock[i]);
}

// ---- shared memory -------------------------------------------------------------------------

void Block::track(size_t offset, size_t bytes, bool write, bool atomic, void* call_site) {
  const Thread& self = *current;
  const char* const what = write ? "write" : "read";
  const auto knows = [&](uint32_t other, uint32_t time) {
    return other == self.number || self.clock[other] >= time;
  };
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Cell& cell = cells[i];
    const size_t at = i * 2;
    if (cell.in_flight)
      fail_at(call_site, "%s of byte %zu of shared memory while a copy of thread %u is under way",
              what, at, cell.writer);
    if (!write && !cell.initialised)
      fail_at(call_site, "read of byte %zu of shared memory, which nobody has written", at);
    if (cell.initialised && !knows(cell.writer, cell.write_time) && !(atomic && cell.atomic))
      fail_at(call_site,
              "race: %s of byte %zu of shared memory, not ordered after thread %u's write", what,
              at, cell.writer);
    if (write) {
      for (int r = 0; r < cell.readers; ++r)
        if (!knows(cell.reader[r], cell.read_time[r]))
          fail_at(call_site,
                  "race: write of byte %zu of shared memory, not ordered after thread %u's read",
                  at, cell.reader[r]);
      cell = Cell{};
      cell.writer = static_cast<uint16_t>(self.number);
      cell.write_time = self.clock[self.number];
      cell.initialised = true;
      cell.atomic = atomic;
      continue;
    }
    // Of the readers two are remembered: this one, and the last that was another.
    if (cell.readers && cell.reader[0] != self.number) {
      cell.reader[1] = cell.reader[0];
      cell.read_time[1] = cell.read_time[0];
      cell.readers = 2;
    }
    cell.reader[0] = static_cast<uint16_t>(self.number);
    cell.read_time[0] = self.clock[self.number];
    if (!cell.readers) cell.readers = 1;
  }
}

void Block::begin_copy(uint32_t target, size_t bytes, void* call_site) {
  char* const data = shared_pointer(target, bytes, "cp.async", call_site);
  if (checked()) {
    const size_t offset = shared_offset(target);
    track(offset, bytes, true, false, call_site);
    for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) cells[i].in_flight = true;
  }
  std::fill_n(data, bytes, '\xff');
}

void Block::end_copy(uint32_t target, size_t bytes, const Thread& thread) {
  if (!checked()) return;
  const size_t offset = shared_offset(target);
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    cells[i].in_flight = false;
    cells[i].write_time = thread.clock[thread.number];
  }
}

// ---- global memory ---------------------------------------------------------------------------

static void track_global(Buffer& buffer, size_t offset, size_t bytes, bool write, void* call_site) {
  Block& b = *block;
  Launch& launch = *b.launch;
  if (buffer.writers.empty()) buffer.writers.resize(buffer.bytes / 2 + 1);
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Writer& writer = buffer.writers[i];
    if (writer.launch == launch.id && writer.block != b.number &&
        launch.known_epoch(b.number, writer.block) < writer.epoch)
      fail_at(call_site,
              "race: %s of byte %zu of a tensor's storage of %zu bytes, which block %u"
              " writes in the same launch",
              write ? "write" : "read", i * 2, buffer.bytes, writer.block);
    if (write) writer = {launch.id, b.number, b.epoch};
  }
}

void fence() {
  if (checked()) block->fenced = block->epoch++;
}

static void synchronise_blocks(const void* address, bool publish, bool learn) {
  Block& b = *block;
  Launch& launch = *b.launch;
  auto& published = launch.published[address];
  auto& known = launch.known[b.number];
  known[b.number] = b.fenced;
  if (learn)
    for (const auto& [other, epoch] : published) known[other] = std::max(known[other], epoch);
  if (publish)
    for (const auto& [other, epoch] : known) published[other] = std::max(published[other], epoch);
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
    return b.track(offset_in(b.smem), bytes, write, atomic, call_site);
  }
  Launch& launch = *b.launch;
  if (offset_in(launch.static_smem) < launch.static_smem_bytes)
    return b.track(b.smem_capacity + offset_in(launch.static_smem), bytes, write, atomic,
                   call_site);
  if (b.on_a_stack(address)) fail_at(call_site, "%s of another thread's local memory", what);
  if (Buffer* buffer = find_buffer(address)) {
    if (offset_in(buffer->data) + bytes > buffer->bytes)
      fail_at(call_site, "%s of %zu bytes across the end of a tensor's storage of %zu bytes", what,
              bytes, buffer->bytes);
    if (atomic) return synchronise_blocks(pointer, true, true);
    return track_global(*buffer, offset_in(buffer->data), bytes, write, call_site);
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
  return *flag;
}

void st_release(uint32_t* flag, uint32_t value) {
  fence();
  access(flag, 4, true, true, EMULATOR_CALL_SITE);
  *flag = value;
}

}  // namespace emulator
