// mbarriers. The word in shared memory only says that there is one; what it counts is kept
// beside it. A thread that waits sleeps until a phase ends, and then looks again: it may be the
// phase after the one that it meant.

#include <algorithm>
#include <cstring>

#include "block.h"

namespace emulator {

static constexpr uint64_t kWord = 0x7261'6261'6d62'7272;  // what an mbarrier is made of, here
static constexpr int64_t kMostBytes = (1 << 20) - 1;      // that a phase can expect

Mbarrier& Block::mbarrier_at(uint32_t address, const char* what, void* call_site) {
  const char* const data = shared_pointer(address, 8, what, call_site);
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end())
    fail_at(call_site, "%s: there is no mbarrier at 0x%x", what, address);
  if (checked()) track_shared(shared_offset(address), 8, false, true, call_site);
  if (std::memcmp(data, &kWord, 8))
    fail_at(call_site, "%s: the mbarrier at 0x%x has been overwritten", what, address);
  return found->second;
}

void mbarrier_init(uint32_t address, uint32_t arrivals) {
  void* const call_site = EMULATOR_CALL_SITE;
  Block& b = *block;
  char* const data = b.shared_pointer(address, 8, "mbarrier.init", call_site);
  if (address % 8) fail_at(call_site, "mbarrier.init: 0x%x is not a multiple of 8", address);
  if (arrivals == 0 || arrivals >= 1u << 20)
    fail_at(call_site, "mbarrier.init: %u arrivals", arrivals);
  if (b.mbarriers.count(address))
    fail_at(call_site, "mbarrier.init: there is one at 0x%x already", address);
  if (b.mbarriers.size() == Block::kMostMbarriers)
    fail_at(call_site, "more mbarriers than the emulator has, %u", Block::kMostMbarriers);
  const auto number = static_cast<uint32_t>(b.mbarriers.size());
  Mbarrier& barrier = b.mbarriers[address];
  barrier.arrivals = barrier.pending = arrivals;
  barrier.number = number;
  barrier.maker = current;
  barrier.call_site = call_site;
  if (checked()) b.track_shared(b.shared_offset(address), 8, true, false, call_site);
  std::memcpy(data, &kWord, 8);
}

void fence_mbarrier_init() {
  for (auto& [address, barrier] : block->mbarriers) barrier.fenced |= barrier.maker == current;
}

// Ends the phase if everything has come.
void Block::settle(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  if (checked()) {
    Clock& own = barrier.arriving.own;
    const size_t loads = loads_of(barrier);
    own.resize(std::max(own.size(), loads + 1));
    own[loads] = barrier.phase;
    barrier.arrived = std::move(barrier.arriving);
    barrier.arriving = {};
  }
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

void mbarrier_arrive(uint32_t address, uint32_t bytes) {
  void* const call_site = EMULATOR_CALL_SITE;
  Block& b = *block;
  Mbarrier& barrier = b.mbarrier_at(address, "mbarrier.arrive", call_site);
  if (barrier.pending == 0)
    fail_at(call_site, "mbarrier.arrive: all %u of the phase have come to 0x%x", barrier.arrivals,
            address);
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes)
    fail_at(call_site, "mbarrier.expect_tx: more than %ld bytes", static_cast<long>(kMostBytes));
  --barrier.pending;
  b.publish(barrier.arriving, *current);
  b.settle(barrier);
  if (b.launch->seed && b.random.one_in(4)) b.switch_thread();
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  void* const call_site = EMULATOR_CALL_SITE;
  Block& b = *block;
  if (parity > 1) fail_at(call_site, "mbarrier.try_wait: the parity %u", parity);
  for (;;) {
    Mbarrier& barrier = b.mbarrier_at(address, "mbarrier.try_wait", call_site);
    if (barrier.phase % 2 != parity) {
      b.learn(barrier.arrived, *current);
      break;
    }
    barrier.waiting.push_back(current);
    b.wait(State::kAtMbarrier, static_cast<int>(address), call_site);
  }
  if (b.launch->seed && b.random.one_in(4)) b.switch_thread();
}

// Of threads' writes, for TMA and wgmma; see Block::async_read.
void fence_proxy_async() {
  if (!checked()) return;
  Thread& self = *current;
  self.proxy_fences.push_back(self.view.own[self.number]++);
}

// At the end of a block: bytes that were expected, or came, for nothing.
void Block::check_mbarriers() {
  for (const auto& [address, barrier] : mbarriers)
    if (barrier.bytes)
      fail_at(barrier.call_site, "the mbarrier at 0x%x is left with %ld bytes", address,
              static_cast<long>(barrier.bytes));
}

}  // namespace emulator
