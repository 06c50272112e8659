// What an op needs of torch's CUDA: the key it registers under, the tensors' device and
// stream, what the device is. The kernels know nothing of this.
//
//   const OnDevice device(x);                        // x's device is current until the end
//   check_launch("topk_route", cuda::topk_route(params, device.stream()));
//   ...
//   TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) { m.impl("topk_route", &topk_route); }
//
// In the emulator (tests/emulator/) the ops take the place of the CPU ops: the tensors
// are a CPU's, and the device is one that it pretends to be.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include "cuda/kernels/dtypes.h"

#ifdef MOE_EXT_EMULATOR
#include "emulator/emulator.h"
#define MOE_EXT_CUDA_KEY CPU
#else
// Not ATen/cuda/CUDAContext.h: it needs the headers of cuBLAS, cuSPARSE and cuSOLVER, which
// a toolkit may lack.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <string>
#define MOE_EXT_CUDA_KEY CUDA
#endif

namespace moe_ext {

#ifdef MOE_EXT_EMULATOR

class OnDevice {
 public:
  explicit OnDevice(const at::Tensor&) {}

  cudaStream_t stream() const { return nullptr; }
  int sm() const { return emulator::device().sm; }
  int sm_count() const { return emulator::device().sm_count; }
  int64_t smem() const { return emulator::device().smem_per_block + 1024; }
};

#else

class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& tensor) : guard_(tensor.device()) {}

  // The stream that torch is filling.
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(); }

  // The architecture: 80 for sm_80.
  int sm() const {
    return attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
           attribute(cudaDevAttrComputeCapabilityMinor);
  }

  // How many multiprocessors there are, for persistent grids.
  int sm_count() const { return attribute(cudaDevAttrMultiProcessorCount); }

  // Bytes of shared memory that a multiprocessor has, of which a block takes 1 KB unasked.
  int64_t smem() const { return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }

 private:
  // The driver has these at hand: no wait, and allowed while a graph is captured.
  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, guard_.current_device().index()));
    return value;
  }

  c10::cuda::CUDAGuard guard_;
};

extern const char built_for[];  // build_info.cpp: "sm_80, compute_80"

// The error for a GPU that was not built for.
inline std::string other_gpu(const cudaDeviceProp& device) {
  const std::string major = std::to_string(device.major), minor = std::to_string(device.minor);
  const char* all =
      device.major == 9 && device.minor == 0 ? "a" : "";  // as moe_ext/_load.py has it
  return std::string("moe_ext was built for ") + built_for + ", and this GPU is a " + device.name +
         " (sm_" + major + minor +
         "). Rebuild it for this one: " + "TORCH_CUDA_ARCH_LIST=" + major + "." + minor + all +
         " pip install --no-build-isolation --no-deps --force-reinstall . in the folder of"
         " moe_ext's sources (sm_80 is the oldest that it can be built for)";
}

#endif

// A tensor's dtype as the kernels name it; the op's checks let nothing else through.
inline cuda::Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return cuda::Dtype::f64;
    case at::kFloat:
      return cuda::Dtype::f32;
    case at::kBFloat16:
      return cuda::Dtype::bf16;
    default:
      TORCH_INTERNAL_ASSERT(tensor.scalar_type() == at::kHalf);
      return cuda::Dtype::f16;
  }
}

// Every launcher's result goes through this.
inline void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
#ifdef MOE_EXT_EMULATOR
  TORCH_CHECK(false, op, ": ", emulator::error_name(error));
#else
  cudaGetLastError();  // a failed launch must not be reported again by the next check
  if (error == cudaErrorNoKernelImageForDevice) {
    cudaDeviceProp device{};
    C10_CUDA_CHECK(cudaGetDeviceProperties(&device, c10::cuda::current_device()));
    TORCH_CHECK(false, op, ": ", other_gpu(device));
  }
  TORCH_CHECK(false, op, ": ", cudaGetErrorString(error));
#endif
}

}  // namespace moe_ext
