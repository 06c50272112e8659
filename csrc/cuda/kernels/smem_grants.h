// What kernels have been allowed of dynamic shared memory. Host only; no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

namespace moe_ext::cuda {

// A kernel must be allowed more than 48 KB, on every device that it runs on; asking takes about
// as long as a launch. May be used by several threads.
class SmemGrants {
 public:
  // ask(), unless it has succeeded before for this kernel and device, and as many bytes. A thread
  // that comes while another asks waits for the answer.
  template <class Ask>
  cudaError_t get(const void* kernel, int device, size_t bytes, Ask ask) {
    const std::lock_guard lock(mutex_);
    size_t& granted = granted_[{kernel, device}];
    if (bytes <= granted) return cudaSuccess;
    const cudaError_t error = ask();
    if (error == cudaSuccess) granted = bytes;
    return error;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, size_t> granted_;
};

}  // namespace moe_ext::cuda
