// The state of a running grid: blocks, their warps and threads. Everything runs on one OS
// thread, one fiber at a time, so nothing here is locked.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../emulator.h"

namespace emulator {

struct Random {
  uint64_t state = 1;
  uint32_t operator()() {  // xorshift64
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
  }
  bool one_in(uint32_t n) { return (*this)() % n == 0; }
};

uint64_t mix(uint64_t x);  // a hash of 64 bits

// What a thread knows of every other's progress (races.cpp).
using Clock = std::vector<uint32_t>;                 // of a block's threads
using Clocks = std::unordered_map<uint32_t, Clock>;  // by block
using SharedClocks = std::shared_ptr<const Clocks>;  // null: none
struct View {
  Clock own;  // of its block
  SharedClocks others;
};

enum class State : uint8_t {
  kRunnable,
  kInWarpOp,
  kAtBarrier,
  kAtMbarrier,
  kForRegisters,
  kExited
};

struct AsyncCopy {
  uint32_t target;
  const void* source;
  uint16_t size, bytes;  // of the target, of the source: the rest is zero
  uint32_t group;
  bool done;
  void* call_site;
};

// A tensor map, decoded (tensor_map.cpp): dimensions from the innermost on.
constexpr int kMostDims = 5;
struct TensorMap {
  uint64_t magic;
  char* data;
  uint64_t size[kMostDims], stride[kMostDims];  // of elements; in bytes
  uint16_t box[kMostDims];
  uint8_t dims;
  bool swizzled;

  uint32_t row_bytes() const { return box[0] * 2u; }  // of the box
  uint32_t rows() const {
    uint32_t count = 1;
    for (int d = 1; d < dims; ++d) count *= box[d];
    return count;
  }
  uint32_t bytes() const { return rows() * row_bytes(); }
};

// A box on its way (bulk_copy.cpp), of which a row is a piece.
struct Box {
  TensorMap map;
  int at[kMostDims];
  uint32_t shared;  // address
  void* call_site;
};
struct BoxLoad : Box {
  uint32_t barrier, delivered, first;  // pieces; the one that comes first
};
struct BoxStore : Box {
  uint32_t group;
  bool read = false;       // out of shared memory, into
  std::vector<char> held;  //
};

struct Thread {
  void* stack_pointer;
  char* stack;  // its lowest byte
  uint3 index;
  uint32_t number;  // in the block
  uint8_t lane, warp;
  State state;
  int waits_in;     // which warp operation or barrier
  void* call_site;  // of what it waits in
  int result;       // of the barrier that it waited at
  std::vector<AsyncCopy> copies;
  uint32_t copy_group;
  std::vector<BoxStore> stores;
  uint32_t store_group, stores_read;   // TMA's: the next group; how many were waited for
  std::vector<uint32_t> proxy_fences;  // by its own clock
  View view;
  SharedClocks fenced, heard;  // what its last fence covers; what its atomics have met since
};

// A warp operation of which some lanes are still to come.
struct WarpOperation {
  uint32_t mask = 0, arrived = 0;  // mask 0: the slot is free
  WarpOp op;
  void* call_site;
};

// A wgmma that is issued and not waited for, and what it adds to (warpgroup.cpp).
struct Product {
  Wgmma what;
  float* d;  // of lane 0: which accumulators
  uint32_t group;
  uint32_t ticket;  // how many the warp has issued with it
  bool done;
  void* call_site;
};
struct WgmmaCall {  // of a lane
  Wgmma what;
  float* d;
};
struct Accumulators {
  float* d[32];
  int n, in_flight;          // products
  std::vector<float> value;  // 16 rows of n
};

struct Warp {
  uint32_t existing, exited, runnable;     // masks of lanes
  std::deque<Product> products, retired;   // retired: in a checked build, the last of them
  std::vector<Accumulators> accumulators;  // that are in flight
  uint32_t product_group, issued;          // products: the next one's group; how many so far
  bool fenced;                             // since accumulators may have been touched
  uint32_t registers;                      // a thread
  uint64_t history;                        // a hash of what a warpgroup does together
  std::vector<WarpOperation> operations;
  uint64_t value[32], argument[32], result[32];
  void* pointer[32];
  uint32_t priority;
};

struct Barrier {
  uint32_t expected = 0, arrived = 0;
  int accumulated = 0;
  void* call_site[32] = {};  // by warp
  std::vector<Thread*> waiting;
  View view;
};

struct Mbarrier {
  uint32_t arrivals = 0, pending = 0;  // of a phase
  int64_t bytes = 0;                   // expected and not yet landed
  uint32_t phase = 0;
  uint32_t number = 0;  // in the block
  const Thread* maker = nullptr;
  bool fenced = false;  // for TMA to use
  void* call_site = nullptr;
  std::vector<Thread*> waiting;
  View arriving, arrived;  // of this phase; of the last
};

// What the race detector knows of two bytes of memory (races.cpp). Fresh ones are zeros.
struct Access {
  uint32_t block, time;  // time 0: none
  uint16_t thread;
};
struct Cell {
  Access writer, reader[2];
  uint32_t launch;  // to which these belong
  bool initialised, in_flight, atomic;
  bool async;  // written by TMA
};

constexpr uint32_t kDynamicBase = 0x400;    // shared addresses of dynamic and of static
constexpr uint32_t kStaticBase = 0x100000;  // shared memory

// The grid that runs.
struct Launch {
  const char* name;
  dim3 grid, block;
  size_t smem_bytes;
  Entry entry;
  void* arguments;
  size_t argument_bytes;
  uint32_t id;
  uint64_t seed;
  Delivery delivery;
  char* static_smem = nullptr;  // the thread-local block of the kernel's library
  size_t static_smem_bytes = 0;
  const char *library_begin = nullptr, *library_end = nullptr;
  std::vector<uint32_t> order;  // of the blocks
  size_t next = 0;
  uint64_t idle = 0;  // pauses since something happened
  Random random;
  uint32_t elected;  // the lane that elect.sync takes
  std::string error;

  std::unordered_map<const void*, SharedClocks> published;  // by atomics (races.cpp)
};

class Block {
 public:
  Block();
  ~Block();
  Block(const Block&) = delete;

  void start(Launch& launch, uint32_t number);
  // Runs until the block is finished, or yields to another, or an error is found.
  void resume();
  bool finished() const { return live == 0; }

  // ---- scheduler.cpp
  Thread* pick();
  void wait(State state, int waits_in, void* call_site);
  void wake(Thread& thread);
  void switch_thread();
  void exit_thread();
  void pause();
  [[noreturn]] void report_stuck(const char* what);
  std::string describe(const Thread& thread);

  // ---- barrier.cpp
  void complete(Barrier& barrier);

  // ---- warp.cpp, matrix.cpp
  uint64_t warp_operation(WarpOp op, uint32_t mask, uint64_t value, uint64_t argument,
                          void* pointer, void* call_site);
  void execute(Warp& warp, const WarpOperation& operation);
  void load_matrices(Warp& warp, void* call_site);

  void store_matrices(Warp& warp, void* call_site);
  void rows_of_matrix(char* (&rows)[8], Warp& warp, int m, bool write, void* call_site);

  // ---- async_copy.cpp
  void deliver(AsyncCopy& copy);
  void deliver_some();

  // ---- mbarrier.cpp
  Mbarrier& mbarrier_at(uint32_t address, const char* what, void* call_site);
  void settle(Mbarrier& barrier);
  void check_mbarriers();

  // ---- bulk_copy.cpp
  void deliver_rows(BoxLoad& load, uint32_t rows);
  bool deliver_a_row();
  void read_source(BoxStore& store);
  void write_target(BoxStore& store);
  void check_stores(Thread& thread);

  // ---- warpgroup.cpp
  void execute_warpgroup(Warp& warp, const WarpOperation& operation);
  void issue(Warp& warp, const Wgmma& what, void* call_site);
  void multiply(Warp& warp, Product& product);
  void multiply_next(Warp& warp);
  void retire(Warp& warp, uint32_t groups);
  void check_warpgroups();

  // ---- memory.cpp
  char* shared_pointer(uint32_t address, size_t bytes, const char* what, void* call_site);
  size_t shared_offset(uint32_t address) const {  // in `cells`
    return address >= kStaticBase ? smem_capacity + (address - kStaticBase)
                                  : address - kDynamicBase;
  }

  // ---- races.cpp
  // Who is not a thread has a clock too, behind theirs: a warp's wgmmas, TMA's loads that an
  // mbarrier counts, a thread's TMA stores.
  static constexpr uint32_t kMostWarps = 32, kMostMbarriers = 64;
  uint16_t products_of(const Warp& warp) const {
    return static_cast<uint16_t>(count + (&warp - warps.data()));
  }
  uint16_t loads_of(const Mbarrier& barrier) const {
    return static_cast<uint16_t>(count + kMostWarps + barrier.number);
  }
  uint16_t stores_of(const Thread& thread) const {
    return static_cast<uint16_t>(count + kMostWarps + kMostMbarriers + thread.number);
  }
  std::string author(const Access& access) const;
  void track_shared(size_t offset, size_t bytes, bool write, bool atomic, void* call_site);
  void begin_copy(uint32_t target, size_t bytes, void* call_site);
  void end_copy(uint32_t target, size_t bytes, const Thread& thread);
  void async_read(uint32_t address, size_t bytes, const Access* reader, const char* what,
                  void* call_site);
  void check_async(const Cell& cell, size_t i, const char* what, void* call_site) const;
  void async_write(uint32_t address, size_t bytes, Access writer, const char* what,
                   void* call_site);
  void end_async_write(uint32_t address, size_t bytes);
  void check_products(uint32_t address, size_t bytes, const char* what, void* call_site);
  void publish(View& view, Thread& thread);
  void learn(const View& view, Thread& thread);

  Launch* launch = nullptr;
  uint32_t number = 0;
  uint3 index{};
  Random random;
  int order = 0;  // how the next thread is chosen
  uint32_t count = 0, live = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t runnable_warps = 0, last_warp = 0;
  Barrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;  // by address
  std::vector<BoxLoad> loads;
  uint32_t free_registers = 0;

  char* smem = nullptr;  // dynamic
  size_t smem_bytes = 0, smem_capacity = 0;
  std::vector<char> static_smem;  // while another block runs
  std::vector<Cell> cells;

  Thread* resume_with = nullptr;
  void* grid_stack_pointer = nullptr;  // of launch_grid, which resumed this block

  // ---- fiber.cpp
  void reserve_stacks(size_t threads);
  bool on_a_stack(const char* address) const {
    return address >= stacks && address < stacks + stack_count * kStackStride;
  }
  static constexpr size_t kPage = 4096, kStack = 64 << 10, kStackStride = kStack + kPage;
  static constexpr size_t kMaxSmem = 256 << 10;

 private:
  char* stacks = nullptr;
  size_t stack_count = 0;
  char* smem_mapping = nullptr;
};

extern Thread* current;  // the running thread; null outside of kernels
extern Block* block;     // its block

// Saves the stack pointer and the registers that a call preserves, and goes on where `to`
// was saved.
extern "C" void emulator_switch_stack(void** save, void* to);

// ---- report.cpp
std::string place_of(void* call_site);  // function [file:line] <- its callers, where inlined
bool same_place(void* a, void* b);
[[noreturn]] void fail_at(void* call_site, const char* format, ...)
    __attribute__((format(printf, 2, 3)));
[[noreturn]] void abandon_grid(std::string message);

// ---- memory.cpp
std::string nearest_buffer(const char* address);

// ---- matrix.cpp
struct MmaOperands {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};
void execute_mma(WarpOp op, void* const* operands);
float from_half(bool bf16, uint32_t bits);
typedef float Row __attribute__((vector_size(32)));  // 8 floats of a row of B or C

}  // namespace emulator

#define EMULATOR_CALL_SITE __builtin_return_address(0)
