// What a launch does on the host.
#include <thread>
#include <vector>

#include "cuda/kernels/smem_grants.h"
#include "micro.h"

// Threads that each launch `kernels` kernels on `devices` devices, with `first` and then `then`
// bytes. The first answer for a kernel and device is an error, after which the thread tries again.
// asked: (kernels, devices), how often each was asked for. Returns how many answers were errors.
MICRO_KERNEL micro_smem_grants(int threads, int kernels, int devices, int first, int then,
                               int* asked) {
  moe_ext::cuda::SmemGrants grants;
  std::vector<int> errors(threads);
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      for (const int bytes : {first, then}) {
        for (int i = 0; i < kernels * devices; ++i) {
          int& count = asked[i];
          const auto ask = [&] { return count++ ? cudaSuccess : cudaErrorInvalidValue; };
          while (grants.get(asked + i / devices, i % devices, bytes, ask) != cudaSuccess) {
            ++errors[thread];
          }
        }
      }
    });
  }
  for (auto& thread : running) thread.join();
  int all = 0;
  for (const int some : errors) all += some;
  return all;
}
