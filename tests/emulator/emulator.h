// The emulator's interface: what device code (through device_code.h and ptx.cuh), the ops
// (through csrc/cuda/device.h) and the tests (through the C functions at the end) may
// call. docs/emulator.md tells how it works.
#pragma once

#include <cuda.h>
#include <driver_types.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

namespace emulator {

// ---- what it pretends to be ----------------------------------------------------------

struct Device {
  int sm;
  int sm_count;           // few, so that persistent kernels take several turns
  size_t smem_per_block;  // bytes that a block may have, static and dynamic
};
const Device& device();

const char* error_name(cudaError_t error);

// ---- how hostile it is -----------------------------------------------------------------

enum Delivery : int {
  kBySeed = -1,
  kLatest = 0,  // at the last moment that a wait allows
  kRandom = 1,
  kEager = 2,  // at once
};

struct Settings {
  uint64_t seed = 0;  // 0: threads and blocks in order; else shuffled
  Delivery delivery = kBySeed;
  int device = 0;
  bool refuse_maps = false;  // as a driver that makes no tensor maps
};
Settings& settings();

// Whether the kernels were compiled with every access checked (build.py: checked).
bool checked();
void set_checked();

// ---- built-in variables -----------------------------------------------------------------

// Constant within a thread, so that the compiler may keep what they return.
uint3 thread_idx() __attribute__((const));
uint3 block_idx() __attribute__((const));
dim3 block_dim() __attribute__((const));
dim3 grid_dim() __attribute__((const));

// ---- memory -----------------------------------------------------------------------------

void* dyn_smem();
uint32_t shared_address(const void* pointer);

// Memory that kernels may use. It ends, or begins, at a page that cannot be touched, and
// is filled with NaN (all bits set).
void* allocate(size_t bytes);
void release(void* pointer);

// Called for every access that is checked: atomics always, the rest in a checked build.
void access(const void* pointer, size_t bytes, bool write, bool atomic, void* call_site);

// ---- what threads do together ---------------------------------------------------------------

enum BarrierOp { kBarrierSync, kBarrierAnd, kBarrierOr, kBarrierCount, kBarrierArrive };
// threads = 0: all of the block that have not exited.
int barrier(int id, int threads, BarrierOp op, int predicate);

enum WarpOp : int {
  kSyncWarp,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  kMatchAny,
  kMatchAll,
  kReduceAdd,
  kReduceMinUnsigned,
  kReduceMinSigned,
  kReduceMaxUnsigned,
  kReduceMaxSigned,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
  kLdmatrix,
  kMmaBf16,
  kMmaF16,
  kMmaTf32,
  kStmatrix,
  kWgmma,
  kWgmmaFence,
  kWgmmaCommit,
  kWgmmaWait,
  kElect,
  kSetRegisters,
};
uint64_t collective(WarpOp op, uint32_t mask, uint64_t value, uint64_t argument = 0);
uint32_t active_mask();

void ldmatrix(uint32_t* registers, uint32_t row, int matrices, bool transposed);
void mma(WarpOp op, float* c, const uint32_t* a, const uint32_t* b);
uint32_t to_tf32(float x);
void stmatrix(uint32_t row, const uint32_t* registers, bool transposed);
bool elect_one();

// A warpgroup's product of 64 x n x 16; a and b are descriptors of shared memory.
struct Wgmma {
  int n;
  bool bf16, a_mn, b_mn, accumulate;
  uint64_t a, b;
};
void wgmma(const Wgmma& product, float* d);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);
void set_registers(int count, bool more);

// ---- approximations: at most so many units of the last place off --------------------------------

constexpr int kEx2Ulps = 2, kRcpUlps = 1;
float ex2_approx(float x);
float rcp_approx(float x);

// ---- asynchronous copies ----------------------------------------------------------------------

void cp_async(uint32_t target, const void* source, int size, int bytes);
void cp_async_commit();
void cp_async_wait(int groups);

// ---- barriers that count bytes, and copies of boxes of a tensor ------------------------------

void mbarrier_init(uint32_t barrier, uint32_t arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier, uint32_t bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
void fence_proxy_async();

// As cuTensorMapEncodeTiled, of 16-bit elements; false where that would refuse. strides: in
// bytes, of the dimensions but the first.
bool encode_tensor_map(CUtensorMap* map, const void* data, int dims, const uint64_t* sizes,
                       const uint64_t* strides, const uint32_t* box, bool swizzled);
void tma_load(uint32_t target, const CUtensorMap& map, uint32_t barrier, const int* at, int dims);
void tma_store(const CUtensorMap& map, uint32_t source, const int* at, int dims);
void tma_store_commit();
void tma_store_wait(int groups, bool only_read);

// ---- between blocks -----------------------------------------------------------------------------

void fence();
void pause();  // lets others run: a thread that spins must call it
uint32_t ld_acquire(const uint32_t* flag);
void st_release(uint32_t* flag, uint32_t value);

[[noreturn]] void trap();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- launch ------------------------------------------------------------------------------------

using Entry = void (*)(void* arguments);

// Runs the whole grid before it returns. Throws std::runtime_error on what it detects;
// returns what a device would of a launch that it refuses.
cudaError_t launch_grid(const char* name, dim3 grid, dim3 block, size_t smem_bytes,
                        const void* kernel, Entry entry, void* arguments, size_t argument_bytes);

template <class... Parameters, class... Arguments>
cudaError_t launch(const char* name, dim3 grid, dim3 block, size_t smem_bytes,
                   void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  };
  Call call{kernel, {static_cast<Parameters>(arguments)...}};
  const Entry entry = [](void* opaque) {
    auto* c = static_cast<Call*>(opaque);
    std::apply(c->kernel, c->arguments);
  };
  return launch_grid(name, grid, block, smem_bytes, reinterpret_cast<const void*>(kernel), entry,
                     &call, sizeof call);
}

}  // namespace emulator

// For Python, through ctypes.
extern "C" {
void moe_ext_emulator_set(uint64_t seed, int delivery, int device, bool refuse_maps);
uint64_t moe_ext_emulator_launches();
const char* moe_ext_emulator_launched();
}
