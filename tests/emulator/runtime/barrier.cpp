// __syncthreads and the named barriers. A barrier counts arrivals; the last one wakes all.

#include "block.h"

namespace emulator {

void Block::complete(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) {
    learn(barrier.view, *thread);
    thread->result = barrier.accumulated;
    wake(*thread);
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.view = {};
}

int barrier(int id, int threads, BarrierOp op, int predicate) {
  void* const call_site = EMULATOR_CALL_SITE;
  Block& b = *block;
  Thread& self = *current;
  if (id < 0 || id > 15) fail_at(call_site, "there is no barrier %d", id);
  if (threads % 32 || threads < 0) fail_at(call_site, "a barrier for %d threads", threads);
  Barrier& barrier = b.barriers[id];
  const uint32_t expected = static_cast<uint32_t>(threads);
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.accumulated = op == kBarrierAnd;
    for (void*& site : barrier.call_site) site = nullptr;
  } else if (barrier.expected != expected) {
    fail_at(call_site, "barrier %d is for %u threads here and for %u elsewhere", id, expected,
            barrier.expected);
  }
  // bar.sync is .aligned: the lanes of a warp come to the same one.
  void*& site = barrier.call_site[self.warp];
  if (!site) site = call_site;
  if (!same_place(site, call_site))
    fail_at(call_site, "divergent barrier %d: other lanes of warp %u are at %s", id, self.warp,
            place_of(site).c_str());
  if (op == kBarrierAnd) barrier.accumulated &= predicate != 0;
  if (op == kBarrierOr) barrier.accumulated |= predicate != 0;
  if (op == kBarrierCount) barrier.accumulated += predicate != 0;
  b.publish(barrier.view, self);
  ++barrier.arrived;
  const uint32_t needed = expected ? expected : b.live;
  if (barrier.arrived < needed) {
    if (op == kBarrierArrive) return 0;
    barrier.waiting.push_back(&self);
    b.wait(State::kAtBarrier, id, call_site);
    return self.result;
  }
  const int result = barrier.accumulated;
  if (op != kBarrierArrive) b.learn(barrier.view, self);
  b.complete(barrier);
  if (b.launch->seed && op != kBarrierArrive && b.random.one_in(2)) b.switch_thread();
  return result;
}

}  // namespace emulator
