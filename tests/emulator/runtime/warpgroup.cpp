// wgmma: products that a warpgroup issues and waits for later; and what else its four warps do
// as one.
//
// Each warp works through its own products, 16 rows each, apart from the other three: at once,
// at any moment, or when a wait demands it. Operands are read then. From the first product on
// the accumulators are NaN, until a wait has retired all that add to them.

#include <algorithm>
#include <cstring>

#include "bulk_copy.h"

namespace emulator {

static constexpr int kGroupWarps = 4, kDepth = 16;

// ---- operands in shared memory ------------------------------------------------------------

// An operand of 128-byte rows, swizzled, as its descriptor says.
class Operand {
 public:
  Operand(uint64_t descriptor, bool mn_major, const char* name, void* call_site)
      : start_(field(descriptor, 0)),
        leading_(field(descriptor, 16)),
        stride_(field(descriptor, 32)),
        mn_major_(mn_major) {
    if (descriptor >> 62 != 1)
      fail_at(call_site, "wgmma: the emulator knows %s with a swizzle of 128 bytes only", name);
    if (descriptor >> 49 & 7) fail_at(call_site, "wgmma: the base offset of %s is not 0", name);
    if (mn_major && start_ % 1024)
      fail_at(call_site, "wgmma: %s begins at 0x%x, within 8 rows", name, start_);
  }

  // The 16 bytes that have 8 neighbours: along k from (mn, k) on, or along mn.
  uint32_t chunk(int mn, int k) const {
    const uint32_t at =
        mn_major_ ? start_ + mn % 64 * 2 + mn / 64 * leading_ + k % 8 * 128 + k / 8 * stride_
                  : start_ + mn / 8 * stride_ + mn % 8 * 128 + 2 * k;
    return swizzle128(at);
  }

  template <class Body>
  void each_chunk(int mn_begin, int mn_end, Body body) const {  // body(address, mn, k)
    const int mn_step = mn_major_ ? 8 : 1, k_step = mn_major_ ? 1 : 8;
    for (int k = 0; k < kDepth; k += k_step)
      for (int mn = mn_begin; mn < mn_end; mn += mn_step) body(chunk(mn, k), mn, k);
  }

  bool mn_major() const { return mn_major_; }

 private:
  static uint32_t field(uint64_t descriptor, int bit) { return (descriptor >> bit & 0x3fff) << 4; }
  uint32_t start_, leading_, stride_;
  bool mn_major_;
};

struct Operands {
  Operand a, b;
  Operands(const Wgmma& what, void* call_site)
      : a(what.a, what.a_mn, "A", call_site), b(what.b, what.b_mn, "B", call_site) {}
};

// ---- issue ----------------------------------------------------------------------------------

static Accumulators* find(Warp& warp, const float* d) {
  for (Accumulators& all : warp.accumulators)
    if (all.d[0] == d) return &all;
  return nullptr;
}

// Row and column of lane's d[i] among a warp's 16 rows.
static int row_of(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
static int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

static void begin(Warp& warp, float* const (&d)[32], int n, void* call_site) {
  if (!warp.fenced)
    fail_at(call_site, "wgmma: no wgmma.fence since the accumulators may have been touched");
  Accumulators& all = warp.accumulators.emplace_back();
  std::copy_n(d, 32, all.d);
  all.n = n;
  all.in_flight = 0;
  all.value.resize(16 * n);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < n / 2; ++i)
      all.value[row_of(lane, i) * n + column_of(lane, i)] = d[lane][i];
  for (float* of_lane : d) std::memset(of_lane, 0xff, n / 2 * sizeof(float));
}

void Block::issue(Warp& warp, const Wgmma& what, void* call_site) {
  float* d[32];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* call = static_cast<const WgmmaCall*>(warp.pointer[lane]);
    d[lane] = call->d;
    if (call->what.a != what.a || call->what.b != what.b ||
        call->what.accumulate != what.accumulate)
      fail_at(call_site, "wgmma: lane %d has other operands", lane);
  }
  const auto index = static_cast<uint32_t>(&warp - warps.data());
  if (index / kGroupWarps * kGroupWarps + kGroupWarps > warps.size())
    fail_at(call_site, "wgmma: the block's last warpgroup is not whole");
  const Operands operands(what, call_site);
  const int row = index % kGroupWarps * 16;
  const auto look_at = [&](uint32_t address, int, int) {
    shared_pointer(address, 16, "wgmma", call_site);
    if (checked()) async_read(address, 16, nullptr, "wgmma", call_site);
  };
  operands.a.each_chunk(row, row + 16, look_at);
  operands.b.each_chunk(0, what.n, look_at);

  Accumulators* all = find(warp, d[0]);
  if (!all) begin(warp, d, what.n, call_site), all = &warp.accumulators.back();
  if (all->n != what.n)
    fail_at(call_site, "wgmma: the accumulators in flight are of another shape");
  ++all->in_flight;
  warp.products.push_back({what, d[0], warp.product_group, ++warp.issued, false, call_site});
  if (launch->delivery == kEager) multiply(warp, warp.products.back());
}

// A write of shared memory must not meet an operand of a product that may yet read it: one that
// the writing thread does not know to be retired.
void Block::check_products(uint32_t address, size_t bytes, const char* what, void* call_site) {
  if (!checked()) return;
  for (Warp& warp : warps) {
    const Clock& clock = current->view.own;
    const size_t id = products_of(warp);
    const uint32_t known = id < clock.size() ? clock[id] : 0;
    const auto look = [&](const Product& product) {
      if (product.ticket <= known) return;
      const Operands operands(product.what, product.call_site);
      const int row = (&warp - warps.data()) % kGroupWarps * 16;
      const auto look_at = [&](uint32_t chunk, int, int) {
        if (chunk + 16 > address && chunk < address + bytes)
          fail_at(call_site, "race: %s writes 0x%x, which %s may yet read", what, chunk,
                  author({number, product.ticket, products_of(warp)}).c_str());
      };
      operands.a.each_chunk(row, row + 16, look_at);
      operands.b.each_chunk(0, product.what.n, look_at);
    };
    for (const Product& product : warp.retired) look(product);
    for (const Product& product : warp.products) look(product);
  }
}

// ---- execution ------------------------------------------------------------------------------

// to[k][mn - begin], k < 16.
static void read_operand(Block& b, const Operand& operand, const Wgmma& what, int begin, int end,
                         float* to, void* call_site) {
  const int width = end - begin;
  operand.each_chunk(begin, end, [&](uint32_t address, int mn, int k) {
    uint16_t element[8];
    std::memcpy(element, b.shared_pointer(address, 16, "wgmma", call_site), 16);
    for (int i = 0; i < 8; ++i) {
      const float value = from_half(what.bf16, element[i]);
      if (operand.mn_major()) {
        to[k * width + mn - begin + i] = value;
      } else {
        to[(k + i) * width + mn - begin] = value;
      }
    }
  });
}

void Block::multiply(Warp& warp, Product& product) {
  const Wgmma& what = product.what;
  const Operands operands(what, product.call_site);
  const int row = (&warp - warps.data()) % kGroupWarps * 16, n = what.n;
  alignas(32) float a[kDepth * 16], b[kDepth * 256];
  read_operand(*this, operands.a, what, row, row + 16, a, product.call_site);
  read_operand(*this, operands.b, what, 0, n, b, product.call_site);
  float* const value = find(warp, product.d)->value.data();
  for (int m = 0; m < 16; ++m) {
    for (int column = 0; column < n; column += 8) {
      Row sum{};
      for (int k = 0; k < kDepth; ++k)
        sum += a[k * 16 + m] * *reinterpret_cast<const Row*>(b + k * n + column);
      float* const to = value + m * n + column;
      Row before{};
      if (what.accumulate) std::memcpy(&before, to, sizeof before);
      sum += before;
      std::memcpy(to, &sum, sizeof sum);
    }
  }
  product.done = true;
}

void Block::multiply_next(Warp& warp) {
  for (Product& product : warp.products)
    if (!product.done) return multiply(warp, product);
}

// Of this warp's products, those of all but the `groups` youngest groups.
void Block::retire(Warp& warp, uint32_t groups) {
  while (!warp.products.empty() && warp.products.front().group + groups < warp.product_group) {
    Product& product = warp.products.front();
    if (!product.done) multiply(warp, product);
    Accumulators& all = *find(warp, product.d);
    if (--all.in_flight == 0) {
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < all.n / 2; ++i) {
          uint32_t bits;
          std::memcpy(&bits, all.d[lane] + i, 4);
          if (bits != ~0u)
            fail_at(product.call_site, "wgmma: lane %d's accumulator %d was written in flight",
                    lane, i);
          all.d[lane][i] = all.value[row_of(lane, i) * all.n + column_of(lane, i)];
        }
      std::swap(all, warp.accumulators.back());
      warp.accumulators.pop_back();
    }
    if (checked()) warp.retired.push_back(product);
    warp.products.pop_front();
  }
  warp.fenced = false;
  if (!checked()) return;
  constexpr size_t kRemembered = 64;
  while (warp.retired.size() > kRemembered) warp.retired.pop_front();
  const auto retired = warp.issued - static_cast<uint32_t>(warp.products.size());
  const size_t first = (&warp - warps.data()) * 32, id = products_of(warp);
  for (size_t lane = 0; lane < 32; ++lane) {
    Clock& clock = threads[first + lane].view.own;
    clock.resize(std::max(clock.size(), id + 1));
    clock[id] = retired;
  }
}

void Block::execute_warpgroup(Warp& warp, const WarpOperation& operation) {
  const auto remember = [&](uint64_t what) { warp.history = mix(warp.history ^ mix(what)); };
  remember(operation.op);
  for (int lane = 1; lane < 32; ++lane)
    if (warp.value[lane] != warp.value[0])
      fail_at(operation.call_site, "the lanes of a warp ask for different things");
  switch (operation.op) {
    case kWgmma: {
      const Wgmma what = static_cast<const WgmmaCall*>(warp.pointer[0])->what;
      remember(what.n | what.bf16 << 16 | what.a_mn << 17 | what.b_mn << 18 |
               what.accumulate << 19);
      remember(what.a);
      remember(what.b);
      issue(warp, what, operation.call_site);
      break;
    }
    case kWgmmaFence:
      warp.fenced = true;
      break;
    case kWgmmaCommit:
      ++warp.product_group;
      break;
    case kWgmmaWait:
      remember(warp.value[0]);
      retire(warp, static_cast<uint32_t>(warp.value[0]));
      break;
    default:  // kSetRegisters
      remember(warp.value[0]);
  }
}

void wgmma(const Wgmma& what, float* d) {
  WgmmaCall call{what, d};
  block->warp_operation(kWgmma, ~0u, 0, 0, &call, EMULATOR_CALL_SITE);
}
void wgmma_fence() { block->warp_operation(kWgmmaFence, ~0u, 0, 0, nullptr, EMULATOR_CALL_SITE); }
void wgmma_commit() { block->warp_operation(kWgmmaCommit, ~0u, 0, 0, nullptr, EMULATOR_CALL_SITE); }
void wgmma_wait(int groups) {
  block->warp_operation(kWgmmaWait, ~0u, groups, 0, nullptr, EMULATOR_CALL_SITE);
  if (block->launch->seed && block->random.one_in(4)) block->switch_thread();
}

// ---- registers ------------------------------------------------------------------------------

// The first lane of a warp that finds enough of them takes them for all.
void set_registers(int count, bool more) {
  void* const call_site = EMULATOR_CALL_SITE;
  Block& b = *block;
  Warp& warp = b.warps[current->warp];
  const auto wanted = static_cast<uint32_t>(count);
  const uint32_t before = warp.registers;
  b.warp_operation(kSetRegisters, ~0u, wanted | more << 16, 0, nullptr, call_site);
  if (more ? wanted < before : wanted > before)
    fail_at(call_site, "setmaxnreg.%s from %u to %u registers", more ? "inc" : "dec", before,
            wanted);
  while (warp.registers != wanted) {
    if (wanted > warp.registers && b.free_registers < (wanted - warp.registers) * 32) {
      b.wait(State::kForRegisters, count, call_site);
      continue;
    }
    b.free_registers += warp.registers * 32;
    b.free_registers -= wanted * 32;
    warp.registers = wanted;
    for (Thread& thread : b.threads)
      if (thread.state == State::kForRegisters) b.wake(thread);
  }
}

// ---- at the end of a block ------------------------------------------------------------------

void Block::check_warpgroups() {
  for (size_t w = 0; w < warps.size(); ++w) {
    if (!warps[w].products.empty())
      fail_at(warps[w].products.front().call_site, "the block ends with a wgmma in flight");
    if (warps[w].history != warps[w / kGroupWarps * kGroupWarps].history)
      fail_at(nullptr, "the warps of warpgroup %zu have not done the same wgmmas", w / kGroupWarps);
  }
}

}  // namespace emulator
