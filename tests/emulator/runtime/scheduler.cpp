// Which thread runs next. A thread runs until it synchronises: it then waits, or goes on.
// The seed chooses, for every block anew, one of four orders; each finds faults that the
// others miss.

#include <map>

#include "block.h"

namespace emulator {

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

static uint32_t lowest(uint32_t mask) { return __builtin_ctz(mask); }
static uint32_t highest(uint32_t mask) { return 31 - __builtin_clz(mask); }

static uint32_t any_of(uint32_t mask, Random& random) {
  for (uint32_t skip = random() % __builtin_popcount(mask); skip; --skip) mask &= mask - 1;
  return lowest(mask);
}

Thread* Block::pick() {
  if (launch->delivery == kRandom && random.one_in(32)) deliver_some();
  if (!runnable_warps) return nullptr;
  uint32_t warp, lane;
  switch (order) {
    case 0:  // in order
      warp = lowest(runnable_warps);
      lane = lowest(warps[warp].runnable);
      break;
    case 1:  // one warp runs ahead as far as it can
      warp = runnable_warps >> last_warp & 1 && !random.one_in(64) ? last_warp
                                                                   : any_of(runnable_warps, random);
      lane = lowest(warps[warp].runnable);
      break;
    case 2:  // by priorities that rarely change
      warp = lowest(runnable_warps);
      for (uint32_t rest = runnable_warps; rest; rest &= rest - 1)
        if (warps[lowest(rest)].priority > warps[warp].priority) warp = lowest(rest);
      if (random.one_in(256)) warps[warp].priority = random();
      lane = highest(warps[warp].runnable);
      break;
    default:  // any
      warp = any_of(runnable_warps, random);
      lane = any_of(warps[warp].runnable, random);
  }
  last_warp = warp;
  return &threads[warp * 32 + lane];
}

void Block::wake(Thread& thread) {
  thread.state = State::kRunnable;
  warps[thread.warp].runnable |= 1u << thread.lane;
  runnable_warps |= 1u << thread.warp;
  launch->idle = 0;
}

static void hide(Block& block, const Thread& thread) {
  Warp& warp = block.warps[thread.warp];
  warp.runnable &= ~(1u << thread.lane);
  if (!warp.runnable) block.runnable_warps &= ~(1u << thread.warp);
}

void Block::wait(State state, int waits_in, void* call_site) {
  current->state = state;
  current->waits_in = waits_in;
  current->call_site = call_site;
  hide(*this, *current);
  switch_thread();
}

// Goes on with some runnable thread, which may be the same.
void Block::switch_thread() {
  Thread* next = pick();
  while (!next && deliver_a_row()) next = pick();
  if (!next) report_stuck("deadlock");
  Thread* previous = current;
  if (next == previous) return;
  if (launch->seed && random.one_in(128)) {  // another block may run in between
    resume_with = next;
    emulator_switch_stack(&previous->stack_pointer, grid_stack_pointer);
    return;
  }
  current = next;
  emulator_switch_stack(&previous->stack_pointer, next->stack_pointer);
}

void Block::resume() {
  block = this;
  current = resume_with;
  emulator_switch_stack(&grid_stack_pointer, current->stack_pointer);
  current = nullptr;
}

// A thread that spins lets others run, and other blocks too.
void Block::pause() {
  if (++launch->idle > 20000 + 64ull * count * launch->order.size())
    report_stuck("livelock: threads spin and nothing happens");
  Thread& self = *current;
  self.call_site = nullptr;
  hide(*this, self);
  Thread* next = pick();
  if (!next && deliver_a_row()) next = pick();
  const bool others = next != nullptr;
  warps[self.warp].runnable |= 1u << self.lane;
  runnable_warps |= 1u << self.warp;
  resume_with = others ? next : &self;
  emulator_switch_stack(&self.stack_pointer, grid_stack_pointer);
}

void Block::exit_thread() {
  Thread& self = *current;
  Warp& warp = warps[self.warp];
  self.state = State::kExited;
  warp.exited |= 1u << self.lane;
  hide(*this, self);
  for (const WarpOperation& operation : warp.operations)
    if (operation.mask >> self.lane & 1) {
      const uint32_t arrived = operation.arrived;
      fail_at(operation.call_site, "exits, but lanes %08x wait for it", arrived);
    }
  launch->idle = 0;
  check_stores(self);
  --live;
  if (live == 0) {
    if (!loads.empty()) fail_at(loads[0].call_site, "the block ends, and the box is on its way");
    check_mbarriers();
    check_warpgroups();
    emulator_switch_stack(&self.stack_pointer, grid_stack_pointer);
    __builtin_unreachable();
  }
  Barrier& all = barriers[0];  // __syncthreads counts those that have not exited
  if (all.arrived && all.expected == 0 && all.arrived >= live) complete(all);
  switch_thread();
  __builtin_unreachable();
}

void Block::report_stuck(const char* what) {
  std::map<std::string, std::vector<uint32_t>> groups;
  for (uint32_t i = 0; i < count; ++i) groups[describe(threads[i])].push_back(i);
  std::string text = std::string("emulator: kernel ") + launch->name + ", block (" +
                     std::to_string(index.x) + "," + std::to_string(index.y) + "," +
                     std::to_string(index.z) + "): " + what;
  for (const auto& [state, members] : groups) {
    text += "\n  threads ";
    for (size_t i = 0, end; i < members.size(); i = end) {
      end = i + 1;
      while (end < members.size() && members[end] == members[end - 1] + 1) ++end;
      text += (i ? ", " : "") + std::to_string(members[i]);
      if (end > i + 1) text += "-" + std::to_string(members[end - 1]);
    }
    text += ": " + state;
  }
  abandon_grid(text);
}

void pause() { block->pause(); }

}  // namespace emulator
