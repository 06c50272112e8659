// What every kernel file includes first, and the only file that knows whether nvcc or
// the emulator (tests/emulator/, a host compiler) compiles it.
//
// A kernel is written once, as ordinary CUDA C++. Three things differ from a textbook's:
// dynamic shared memory is one struct, through dyn_smem<Smem>(); a kernel is launched
// through launch(), never through <<<>>>; instructions that C++ has no word for are
// functions in ptx.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef MOE_EXT_EMULATOR
#include "emulator/device_code.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "smem_grants.h"
#endif

namespace moe_ext::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;  // the mask of all lanes

// The block's dynamic shared memory, LaunchConfig::smem_bytes of it, as one struct. It
// begins at a multiple of 1024 bytes, as the widest swizzle wants it.
template <class Smem>
__device__ __forceinline__ Smem& dyn_smem() {
#ifdef MOE_EXT_EMULATOR
  return *static_cast<Smem*>(emulator::dyn_smem());
#else
  extern __shared__ __align__(1024) unsigned char moe_ext_dyn_smem[];
  return *reinterpret_cast<Smem*>(moe_ext_dyn_smem);
#endif
}

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t smem_bytes;  // dynamic shared memory
  cudaStream_t stream;
  const char* name;  // for the emulator's messages
};

#ifndef MOE_EXT_EMULATOR
// For the current device.
inline cudaError_t allow_smem(const void* kernel, size_t bytes) {
  static SmemGrants grants;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return grants.get(kernel, device, bytes, [&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
  });
}
#endif

// Launches kernel(args...). The only way to launch one; returns what the launch says, the
// kernel itself runs later.
template <class... Parameters, class... Arguments>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
#ifdef MOE_EXT_EMULATOR
  return emulator::launch(config.name, config.grid, config.block, config.smem_bytes, kernel,
                          static_cast<Arguments&&>(arguments)...);
#else
  if (config.smem_bytes > 48 * 1024) {  // more than every device has: it must be asked for
    const cudaError_t error = allow_smem(reinterpret_cast<const void*>(kernel), config.smem_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.smem_bytes;
  launch_config.stream = config.stream;
  return cudaLaunchKernelEx(&launch_config, kernel, static_cast<Parameters>(arguments)...);
#endif
}

}  // namespace moe_ext::cuda
