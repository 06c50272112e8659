// What an op needs of torch's CUDA: the key it registers under, the tensors' device and
// stream, what the device is. The kernels know nothing of this.
//
//   const OnDevice device(x);                        // x's device is current until the end
//   check_launch("topk_route", cuda::topk_route(params, device.stream()));
//   ...
//   TORCH_LIBRARY_IMPL(moe_ext, MOE_EXT_CUDA_KEY, m) { m.impl("topk_route", &topk_route); }
//
// In the emulator (tests/emulator/) the ops take the place of the CPU ops: the tensors
// are a CPU's, and the device is one of two that it pretends to be.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include "cuda/kernels/dtypes.h"

#ifdef MOE_EXT_EMULATOR
#include "emulator/emulator.h"
#define MOE_EXT_CUDA_KEY CPU
#else
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
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
};

#else

class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& tensor) : guard_(tensor.device()) {}

  // The stream that torch is filling.
  cudaStream_t stream() const { return at::cuda::getCurrentCUDAStream(); }

  // The architecture: 80 for sm_80.
  int sm() const { return properties().major * 10 + properties().minor; }

  // How many multiprocessors there are, for persistent grids.
  int sm_count() const { return properties().multiProcessorCount; }

 private:
  static const cudaDeviceProp& properties() { return *at::cuda::getCurrentDeviceProperties(); }

  c10::cuda::CUDAGuard guard_;
};

#endif

// A tensor's dtype in the kernels' words; the op's checks have let nothing else through.
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
  cudaGetLastError();  // a failed launch must not be found again by whoever looks next
  if (error == cudaErrorNoKernelImageForDevice) {
    const auto& device = *at::cuda::getCurrentDeviceProperties();
    TORCH_CHECK(false, op, ": moe_ext was not built for this GPU (", device.name, ", sm_",
                device.major, device.minor,
                "); `python -m moe_ext` says what it was built for. Rebuild it with"
                " `export TORCH_CUDA_ARCH_LIST=",
                device.major, ".", device.minor, "`");
  }
  TORCH_CHECK(false, op, ": ", cudaGetErrorString(error));
#endif
}

}  // namespace moe_ext
