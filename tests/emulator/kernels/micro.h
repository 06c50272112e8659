// Micro-kernels, one for each primitive: they write what the primitive does, and a test
// compares it with the PTX manual. The same sources, compiled by nvcc, tell what a GPU does.
#pragma once

#include "more_ptx.cuh"

// Each is launched through one C function, so that Python can call it in the emulator's
// library and in nvcc's: it returns a cudaError_t, or -1 with the emulator's message.
#define MICRO_KERNEL extern "C" __attribute__((visibility("default"))) int

#ifdef MOE_EXT_EMULATOR
#include <stdexcept>
#include <string>
inline std::string micro_error;
extern "C" __attribute__((used, visibility("default"))) inline const char* micro_error_text() {
  return micro_error.c_str();
}
#endif

template <class... Parameters, class... Arguments>
int run(const char* name, int blocks, int threads, size_t smem_bytes, void (*kernel)(Parameters...),
        Arguments... arguments) {
  const moe_ext::cuda::LaunchConfig config{dim3(blocks), dim3(threads), smem_bytes, nullptr, name};
#ifdef MOE_EXT_EMULATOR
  try {
    return launch(config, kernel, arguments...);
  } catch (const std::exception& error) {
    micro_error = error.what();
    return -1;
  }
#else
  const cudaError_t error = launch(config, kernel, arguments...);
  return error != cudaSuccess ? error : cudaDeviceSynchronize();
#endif
}
