// What the lanes of a warp do together. The last lane to come computes the results of all;
// the others sleep until then.

#include <algorithm>

#include "block.h"

namespace emulator {

static const char* const kNames[] = {
    "__syncwarp",        "__shfl_sync",        "__shfl_up_sync",    "__shfl_down_sync",
    "__shfl_xor_sync",   "__ballot_sync",      "__any_sync",        "__all_sync",
    "__match_any_sync",  "__match_all_sync",   "__reduce_add_sync", "__reduce_min_sync",
    "__reduce_min_sync", "__reduce_max_sync",  "__reduce_max_sync", "__reduce_and_sync",
    "__reduce_or_sync",  "__reduce_xor_sync",  "ldmatrix",          "mma (bf16)",
    "mma (f16)",         "mma (tf32)",         "stmatrix",          "wgmma.mma_async",
    "wgmma.fence",       "wgmma.commit_group", "wgmma.wait_group",  "elect.sync",
    "setmaxnreg"};

static bool is_aligned(WarpOp op) { return op >= kLdmatrix; }  // .sync.aligned: one instruction

// The lane that a shuffle reads; its own where the source is outside of its segment.
static int source_lane(WarpOp op, int lane, uint64_t argument) {
  const int width = static_cast<int>(argument >> 32);
  const int by = static_cast<int>(static_cast<uint32_t>(argument));
  const int first = lane & ~(width - 1), end = first + width;
  switch (op) {
    case kShuffle:
      return first + (by & (width - 1));
    case kShuffleUp:
      return lane - by < first ? lane : lane - by;
    case kShuffleDown:
      return lane + by >= end ? lane : lane + by;
    default:
      return (lane ^ by) < end ? lane ^ by : lane;
  }
}

void Block::execute(Warp& warp, const WarpOperation& operation) {
  const uint32_t mask = operation.mask;
  const auto each_lane = [mask](auto body) {
    for (uint32_t rest = mask; rest; rest &= rest - 1) body(__builtin_ctz(rest));
  };
  const auto fold = [&](uint64_t start, auto combine) {
    each_lane([&](int lane) { start = combine(start, warp.value[lane]); });
    each_lane([&](int lane) { warp.result[lane] = start; });
  };
  const auto as_signed = [](uint64_t bits) { return static_cast<int32_t>(bits); };
  switch (operation.op) {
    case kSyncWarp: {
      View all;
      const size_t first = (&warp - warps.data()) * 32;
      each_lane([&](int lane) { publish(all, threads[first + lane]); });
      each_lane([&](int lane) { learn(all, threads[first + lane]); });
      break;
    }
    case kShuffle:
    case kShuffleUp:
    case kShuffleDown:
    case kShuffleXor:
      each_lane([&](int lane) {
        const int source = source_lane(operation.op, lane, warp.argument[lane]);
        // What a lane that does not take part would give is undefined: NaN.
        warp.result[lane] = mask >> source & 1 ? warp.value[source] : ~uint64_t{0};
      });
      break;
    case kBallot: {
      uint64_t votes = 0;
      each_lane([&](int lane) { votes |= warp.value[lane] << lane; });
      each_lane([&](int lane) { warp.result[lane] = votes; });
      break;
    }
    case kAny:
    case kReduceOr:
      fold(0, [](uint64_t a, uint64_t b) { return a | b; });
      break;
    case kAll:
      fold(1, [](uint64_t a, uint64_t b) { return a & b; });
      break;
    case kReduceAnd:
      fold(~uint64_t{0}, [](uint64_t a, uint64_t b) { return a & b; });
      break;
    case kReduceXor:
      fold(0, [](uint64_t a, uint64_t b) { return a ^ b; });
      break;
    case kMatchAny:
      each_lane([&](int lane) {
        uint64_t equal = 0;
        each_lane([&](int other) {
          if (warp.value[other] == warp.value[lane]) equal |= uint64_t{1} << other;
        });
        warp.result[lane] = equal;
      });
      break;
    case kMatchAll: {
      const uint64_t first = warp.value[__builtin_ctz(mask)];
      bool all = true;
      each_lane([&](int lane) { all &= warp.value[lane] == first; });
      each_lane([&](int lane) { warp.result[lane] = all ? mask : 0; });
      break;
    }
    case kReduceAdd:
      fold(0, [](uint64_t a, uint64_t b) { return static_cast<uint32_t>(a + b); });
      break;
    case kReduceMinUnsigned:
      fold(~0u, [](uint64_t a, uint64_t b) { return std::min(a, b); });
      break;
    case kReduceMaxUnsigned:
      fold(0, [](uint64_t a, uint64_t b) { return std::max(a, b); });
      break;
    case kReduceMinSigned:
      fold(INT32_MAX, [&](uint64_t a, uint64_t b) { return as_signed(a) < as_signed(b) ? a : b; });
      break;
    case kReduceMaxSigned:
      fold(static_cast<uint32_t>(INT32_MIN),
           [&](uint64_t a, uint64_t b) { return as_signed(a) > as_signed(b) ? a : b; });
      break;
    case kLdmatrix:
      load_matrices(warp, operation.call_site);
      break;
    case kStmatrix:
      store_matrices(warp, operation.call_site);
      break;
    case kElect:
      each_lane([&](int lane) { warp.result[lane] = lane == static_cast<int>(launch->elected); });
      break;
    case kWgmma:
    case kWgmmaFence:
    case kWgmmaCommit:
    case kWgmmaWait:
    case kSetRegisters:
      execute_warpgroup(warp, operation);
      break;
    case kMmaBf16:
    case kMmaF16:
    case kMmaTf32:
      execute_mma(operation.op, warp.pointer);
      break;
  }
}

uint64_t Block::warp_operation(WarpOp op, uint32_t mask, uint64_t value, uint64_t argument,
                               void* pointer, void* call_site) {
  Thread& self = *current;
  Warp& warp = warps[self.warp];
  const uint32_t bit = 1u << self.lane;
  if (!(mask & bit))
    fail_at(call_site, "%s: the mask %08x leaves out the lane that calls, %u", kNames[op], mask,
            self.lane);
  if (mask & ~warp.existing)
    fail_at(call_site, "%s: the mask %08x names lanes that the block does not have", kNames[op],
            mask);
  if (mask & warp.exited)
    fail_at(call_site, "%s: the mask %08x names lanes %08x, which have exited", kNames[op], mask,
            mask & warp.exited);
  WarpOperation* operation = nullptr;
  for (WarpOperation& waiting : warp.operations) {
    // Lanes that wait under another mask may come here yet; if not, it ends in a deadlock.
    if (waiting.mask != mask) continue;
    if (waiting.op != op || (is_aligned(op) && !same_place(waiting.call_site, call_site)))
      fail_at(call_site,
              "divergence: %s (mask %08x), while lanes %08x wait in %s (mask %08x) at %s",
              kNames[op], mask, waiting.arrived, kNames[waiting.op], waiting.mask,
              place_of(waiting.call_site).c_str());
    operation = &waiting;
  }
  if (!operation) {
    for (WarpOperation& slot : warp.operations)
      if (!slot.mask) operation = &slot;
    if (!operation) operation = &warp.operations.emplace_back();
    *operation = {mask, 0, op, call_site};
  }
  operation->arrived |= bit;
  warp.value[self.lane] = value;
  warp.argument[self.lane] = argument;
  warp.pointer[self.lane] = pointer;
  if (operation->arrived != mask) {
    wait(State::kInWarpOp, static_cast<int>(operation - warp.operations.data()), call_site);
    return warp.result[self.lane];
  }
  execute(warp, *operation);
  operation->mask = 0;
  for (uint32_t others = mask & ~bit; others; others &= others - 1)
    threads[self.warp * 32 + __builtin_ctz(others)].state = State::kRunnable;
  warp.runnable |= mask;
  launch->idle = 0;
  return warp.result[self.lane];
}

std::string Block::describe(const Thread& thread) {
  switch (thread.state) {
    case State::kExited:
      return "exited";
    case State::kRunnable:
      return "runs or spins";
    case State::kInWarpOp: {
      const WarpOperation& operation = warps[thread.warp].operations[thread.waits_in];
      char text[120];
      snprintf(text, sizeof text, "in %s (mask %08x, arrived %08x, exited %08x) at ",
               kNames[operation.op], operation.mask, operation.arrived, warps[thread.warp].exited);
      return text + place_of(thread.call_site);
    }
    case State::kAtMbarrier: {
      const auto address = static_cast<uint32_t>(thread.waits_in);
      const Mbarrier& barrier = mbarriers.at(address);
      char text[120];
      snprintf(text, sizeof text,
               "at the mbarrier at 0x%x (phase %u, %u of %u have come, %ld bytes are missing) at ",
               address, barrier.phase, barrier.arrivals - barrier.pending, barrier.arrivals,
               static_cast<long>(barrier.bytes));
      return text + place_of(thread.call_site);
    }
    case State::kForRegisters:
      return "for " + std::to_string(thread.waits_in) + " registers, at " +
             place_of(thread.call_site);
    default: {
      const Barrier& barrier = barriers[thread.waits_in];
      return "at barrier " + std::to_string(thread.waits_in) + " (" +
             std::to_string(barrier.arrived) + " of " +
             std::to_string(barrier.expected ? barrier.expected : live) + " have come) at " +
             place_of(thread.call_site);
    }
  }
}

uint64_t collective(WarpOp op, uint32_t mask, uint64_t value, uint64_t argument) {
  return block->warp_operation(op, mask, value, argument, nullptr, EMULATOR_CALL_SITE);
}

bool elect_one() { return block->warp_operation(kElect, ~0u, 0, 0, nullptr, EMULATOR_CALL_SITE); }

// The least that the manual promises: the lane itself.
uint32_t active_mask() { return 1u << current->lane; }

}  // namespace emulator
