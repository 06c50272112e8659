// A launch: the grid's blocks in an order of the seed's, one or a few of them at a time.

#include <link.h>
#include <signal.h>
#include <ucontext.h>

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "memory.h"

namespace emulator {

// An A100, an H100 and an RTX 3090, as far as dispatch can tell, with few multiprocessors.
static const Device kDevices[] = {{80, 5, 163 << 10}, {90, 3, 227 << 10}, {86, 4, 99 << 10}};

Settings& settings() {
  static Settings all;
  return all;
}

const Device& device() { return kDevices[settings().device]; }

const char* error_name(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "error of a launch";
  }
}

uint3 thread_idx() { return current->index; }
uint3 block_idx() { return block->index; }
dim3 block_dim() { return block->launch->block; }
dim3 grid_dim() { return block->launch->grid; }

static uint64_t launches = 0;
static std::string launched;  // since the last moe_ext_emulator_set: names, a line each

// ---- static shared memory ------------------------------------------------------------------
//
// A static __shared__ variable is thread-local, and nothing else in the library of a kernel
// is: so the library's thread-local block is the block's static shared memory.

struct Library {
  uintptr_t kernel;
  Launch* launch;
};

struct ThreadLocalIndex {
  unsigned long module, offset;
};
extern "C" void* __tls_get_addr(ThreadLocalIndex*);

static int look_for_library(dl_phdr_info* info, size_t, void* opaque) {
  const auto& library = *static_cast<Library*>(opaque);
  uintptr_t begin = ~uintptr_t{0}, end = 0;
  size_t thread_local_bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type == PT_LOAD) {
      begin = std::min(begin, info->dlpi_addr + header.p_vaddr);
      end = std::max(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
    }
    if (header.p_type == PT_TLS) thread_local_bytes = header.p_memsz;
  }
  if (library.kernel < begin || library.kernel >= end) return 0;
  Launch& launch = *library.launch;
  launch.library_begin = reinterpret_cast<const char*>(begin);
  launch.library_end = reinterpret_cast<const char*>(end);
  launch.static_smem_bytes = thread_local_bytes;
  ThreadLocalIndex index{info->dlpi_tls_modid, 0};
  if (thread_local_bytes) launch.static_smem = static_cast<char*>(__tls_get_addr(&index));
  return 1;
}

// ---- blocks -------------------------------------------------------------------------------------

void Block::start(Launch& grid, uint32_t which) {
  launch = &grid;
  number = which;
  const dim3 g = grid.grid, b = grid.block;
  index = {which % g.x, which / g.x % g.y, which / g.x / g.y};
  const uint64_t hash = mix(grid.seed * 0x9E37 + mix(which + 1));
  random.state = hash | 1;
  order = grid.seed == 0 ? 0 : 1 + static_cast<int>((hash >> 32) % 3);
  count = live = b.x * b.y * b.z;

  smem_bytes = grid.smem_bytes;
  smem_capacity = (smem_bytes + 1023) / 1024 * 1024;
  smem += static_cast<ptrdiff_t>(kMaxSmem) - (smem - (smem_mapping + kPage)) - smem_capacity;
  std::memset(smem, 0xff, smem_capacity);
  static_smem.assign(grid.static_smem_bytes, '\xff');
  if (checked()) cells.assign((smem_capacity + grid.static_smem_bytes) / 2 + 8, Cell{});

  const uint32_t warp_count = (count + 31) / 32;
  const uint32_t registers = std::min(65536 / (warp_count * 32) / 8 * 8, 255u);
  free_registers = 65536 - registers * warp_count * 32;
  mbarriers.clear();
  loads.clear();
  warps.resize(warp_count);
  runnable_warps = 0;
  last_warp = 0;
  for (uint32_t w = 0; w < warp_count; ++w) {
    Warp& warp = warps[w];
    warp.existing = w * 32 + 32 <= count ? ~0u : (1u << (count - w * 32)) - 1;
    warp.exited = 0;
    warp.runnable = warp.existing;
    warp.operations.clear();
    warp.products.clear();
    warp.retired.clear();
    warp.accumulators.clear();
    warp.product_group = warp.issued = 0;
    warp.fenced = false;
    warp.registers = registers;
    warp.history = 0;
    warp.priority = random();
    runnable_warps |= 1u << w;
  }
  for (Barrier& barrier : barriers) {
    barrier.arrived = 0;
    barrier.waiting.clear();
    barrier.view = {};
  }
  threads.resize(warp_count * 32);
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.index = {i % b.x, i / b.x % b.y, i / b.x / b.y};
    thread.number = i;
    thread.lane = static_cast<uint8_t>(i % 32);
    thread.warp = static_cast<uint8_t>(i / 32);
    thread.state = State::kRunnable;
    thread.call_site = nullptr;
    thread.copies.clear();
    thread.copy_group = 0;
    thread.stores.clear();
    thread.store_group = thread.stores_read = 0;
    thread.proxy_fences.clear();
    if (checked()) {
      thread.view.own.assign(count, 0);
      thread.view.own[i] = 1;
      thread.view.others = thread.fenced = thread.heard = nullptr;
    }
  }
  reserve_stacks(count);
  resume_with = pick();
}

static void check_end(const Block& b) {
  for (size_t i = b.smem_bytes; i < b.smem_capacity; ++i)
    if (static_cast<unsigned char>(b.smem[i]) != 0xff)
      fail(
          "kernel %s, block (%u,%u,%u): byte %zu of dynamic shared memory was written, of which"
          " there are %zu",
          b.launch->name, b.index.x, b.index.y, b.index.z, i, b.smem_bytes);
}

static void run_blocks(Launch& launch) {
  static auto& pool = *new std::vector<std::unique_ptr<Block>>;
  const size_t at_once = launch.seed ? 1 + mix(launch.seed) % 3 : 1;
  while (pool.size() < at_once) pool.push_back(std::make_unique<Block>());
  std::vector<Block*> idle, running;
  for (size_t i = 0; i < at_once; ++i) idle.push_back(pool[i].get());
  Block* loaded = nullptr;  // the one whose static shared memory is in place
  for (;;) {
    while (!idle.empty() && launch.next < launch.order.size()) {
      running.push_back(idle.back());
      idle.pop_back();
      running.back()->start(launch, launch.order[launch.next++]);
    }
    if (running.empty()) return;
    Block*& chosen = running[launch.random() % running.size()];
    if (loaded != chosen) {
      if (loaded && !loaded->finished())
        std::memcpy(loaded->static_smem.data(), launch.static_smem, launch.static_smem_bytes);
      std::memcpy(launch.static_smem, chosen->static_smem.data(), launch.static_smem_bytes);
      loaded = chosen;
    }
    chosen->resume();
    if (!launch.error.empty()) throw std::runtime_error(launch.error);
    if (chosen->finished()) {
      check_end(*chosen);
      loaded = nullptr;
      idle.push_back(chosen);
      std::swap(chosen, running.back());
      running.pop_back();
    }
  }
}

// ---- faults ------------------------------------------------------------------------------------

// A page that cannot be touched was touched. The handler leaves by switching stacks.
static void on_fault(int signal_number, siginfo_t* info, void* context) {
  if (!current) {  // not a kernel's fault
    signal(signal_number, SIG_DFL);
    return;
  }
  const char* const address = static_cast<char*>(info->si_addr);
  const auto* machine = static_cast<ucontext_t*>(context);
  auto* const instruction = reinterpret_cast<char*>(machine->uc_mcontext.gregs[REG_RIP]);
  const Block& b = *block;
  std::string where;
  if (b.on_a_stack(address)) {
    where = "the stack has overflowed";
  } else if (address >= b.smem - 2 * Block::kPage && address < b.smem + Block::kMaxSmem) {
    where = "outside of dynamic shared memory";
  } else {
    where = nearest_buffer(address);
  }
  fail_at(instruction + 1, "access out of bounds at %p: %s", address, where.c_str());
}

namespace {
class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
    static char* const stack = new char[1 << 16];
    stack_t alternate{};
    alternate.ss_sp = stack;
    alternate.ss_size = 1 << 16;
    sigaltstack(&alternate, &stack_);
  }
  ~FaultHandler() {
    sigaltstack(&stack_, nullptr);
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
  }

 private:
  struct sigaction segv_, bus_;
  stack_t stack_;
};
}  // namespace

// ---- launch ------------------------------------------------------------------------------------

static Delivery delivery_of(const Settings& settings) {
  if (settings.delivery != kBySeed) return settings.delivery;
  constexpr Delivery kBySeeds[] = {kLatest, kRandom, kLatest, kEager};
  return kBySeeds[settings.seed % 4];
}

cudaError_t launch_grid(const char* name, dim3 grid, dim3 block_dims, size_t smem_bytes,
                        const void* kernel, Entry entry, void* arguments, size_t argument_bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t threads = uint64_t{block_dims.x} * block_dims.y * block_dims.z;
  if (blocks == 0 || threads == 0 || threads > 1024 || block_dims.z > 64 || grid.x > INT32_MAX ||
      grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;

  Launch launch{};
  launch.name = name;
  launch.grid = grid;
  launch.block = block_dims;
  launch.smem_bytes = smem_bytes;
  launch.entry = entry;
  launch.arguments = arguments;
  launch.argument_bytes = argument_bytes;
  launch.id = static_cast<uint32_t>(++launches);
  launch.seed = settings().seed;
  launch.delivery = delivery_of(settings());
  launch.random.state = mix(launch.seed + launches) | 1;
  launch.elected = launch.seed ? launch.random() % 32 : 0;
  Library library{reinterpret_cast<uintptr_t>(kernel), &launch};
  dl_iterate_phdr(look_for_library, &library);
  if (smem_bytes > device().smem_per_block) return cudaErrorInvalidValue;

  launch.order.resize(blocks);
  for (uint64_t i = 0; i < blocks; ++i) launch.order[i] = static_cast<uint32_t>(i);
  if (launch.seed)
    for (uint64_t i = blocks - 1; i > 0; --i)
      std::swap(launch.order[i], launch.order[launch.random() % (i + 1)]);

  launched += std::string(name) + '\n';
  const FaultHandler handler;
  run_blocks(launch);
  check_margins(name);
  return cudaSuccess;
}

}  // namespace emulator

extern "C" {
void moe_ext_emulator_set(uint64_t seed, int delivery, int device, bool refuse_maps) {
  emulator::settings() = {seed, static_cast<emulator::Delivery>(delivery), device, refuse_maps};
  emulator::launched.clear();
}
const char* moe_ext_emulator_launched() { return emulator::launched.c_str(); }
uint64_t moe_ext_emulator_launches() { return emulator::launches; }
}
