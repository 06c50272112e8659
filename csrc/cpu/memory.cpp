#include "cpu/memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/set.h>

#if defined(__linux__)

#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <mutex>
#include <new>

namespace moe_ext::cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

struct Block {
  void* data;
  size_t bytes;
};

class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block(take((bytes + kHugePage - 1) / kHugePage * kHugePage));
    return {block->data, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  // Never destroyed: tensors may outlive every static object.
  static Pool& get() {
    static Pool* pool = new Pool();
    return *pool;
  }

 private:
  // The smallest kept block that fits with a fifth to spare at most, for the number of
  // rows is a little different in every step; of equal ones the last, which is warmest.
  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = kept_.end();
    for (auto kept = kept_.begin(); kept != kept_.end(); ++kept) {
      const bool fits = kept->bytes >= bytes && kept->bytes <= bytes + bytes / 4;
      if (fits && (best == kept_.end() || kept->bytes <= best->bytes)) best = kept;
    }
    if (best != kept_.end()) {
      const Block block = *best;
      kept_.erase(best);
      kept_bytes_ -= block.bytes;
      in_use_ += block.bytes;
      return block;
    }
    // What is kept and does not fit makes room, the oldest first. A training step comes by
    // more sizes than it ever holds at once: without the half on top of the peak, each
    // would throw out the one that is needed next.
    peak_ = std::max(peak_, in_use_ + bytes);
    while (!kept_.empty() && in_use_ + bytes + kept_bytes_ > peak_ + peak_ / 2) {
      munmap(kept_.front().data, kept_.front().bytes);
      kept_bytes_ -= kept_.front().bytes;
      kept_.pop_front();
    }
    const Block block{map(bytes), bytes};
    in_use_ += bytes;
    return block;
  }

  // Fresh pages that begin at a huge page's border.
  static void* map(size_t bytes) {
    void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped);
    const uintptr_t data = (begin + kHugePage - 1) / kHugePage * kHugePage;
    if (data > begin) munmap(mapped, data - begin);
    munmap(reinterpret_cast<void*>(data + bytes), begin + kHugePage - data);
    madvise(reinterpret_cast<void*>(data), bytes, MADV_HUGEPAGE);
    return reinterpret_cast<void*>(data);
  }

  static void give_back(void* context) {
    auto* block = static_cast<Block*>(context);
    Pool& pool = get();
    {
      const std::lock_guard<std::mutex> lock(pool.mutex_);
      pool.in_use_ -= block->bytes;
      pool.kept_bytes_ += block->bytes;
      pool.kept_.push_back(*block);
      madvise(block->data, block->bytes, MADV_FREE);
    }
    delete block;
  }

  std::mutex mutex_;
  std::deque<Block> kept_;
  size_t in_use_ = 0, kept_bytes_ = 0, peak_ = 0;
};

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  size_t bytes = options.dtype().itemsize();
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < kHugePage) return at::empty(sizes, options);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, Pool::get().allocate(bytes),
                       &Pool::get(), /*resizable=*/true);
  return at::empty({0}, options).set_(storage, 0, sizes);
}

}  // namespace moe_ext::cpu

#else

namespace moe_ext::cpu {

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

}  // namespace moe_ext::cpu

#endif
