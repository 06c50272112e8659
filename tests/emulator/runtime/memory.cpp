// Global memory: buffers between pages that cannot be touched. Shared memory: addresses of
// 32 bits. And what is said of an access outside of them.

#include "memory.h"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>
#include <new>

namespace emulator {

static constexpr size_t kPage = Block::kPage;
static constexpr size_t kMargin = 64;             // bytes on either side whose change is noticed
static constexpr size_t kMostFilled = 256 << 20;  // larger buffers begin as zeros

static std::mutex buffers_mutex;
static std::map<const char*, Buffer>& buffers() {
  static auto* all = new std::map<const char*, Buffer>;  // outlives every tensor
  return *all;
}
static Buffer* last_found = nullptr;

static size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

// Most buffers end where the page ends (to 16 bytes, which kernels may rely on), some begin
// where it begins.
void* allocate(size_t bytes) {
  static uint64_t allocations = 0;
  const std::lock_guard<std::mutex> lock(buffers_mutex);
  const size_t body = round_up(bytes, kPage), mapped = body + 2 * kPage;
  void* mapping =
      mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  char* const pages = static_cast<char*>(mapping) + kPage;
  if (mprotect(pages, body, PROT_READ | PROT_WRITE)) {
    munmap(mapping, mapped);
    throw std::bad_alloc();  // perhaps too many mappings: vm.max_map_count
  }
  const bool at_the_front = mix(++allocations) % 4 == 0;
  char* const data = at_the_front ? pages : pages + body - round_up(bytes, 16);
  Buffer& buffer = buffers()[data];
  buffer.data = data;
  buffer.bytes = bytes;
  buffer.mapping = static_cast<char*>(mapping);
  buffer.mapped = mapped;
  if (bytes <= kMostFilled) {
    std::memset(pages, 0xff, body);
    // NaN in every floating-point type, and no -1: that is an index that means "none".
    for (size_t i = 1; i < bytes; i += 2) data[i] = 0x7f;
    buffer.margin_before = std::min(kMargin, static_cast<size_t>(data - pages));
    buffer.margin_after = std::min(kMargin, static_cast<size_t>(pages + body - data - bytes));
  }
  return data;
}

// Pages that are never touched cost nothing.
static size_t bytes_of_cells(const Buffer& buffer) { return (buffer.bytes / 2 + 1) * sizeof(Cell); }

Cell* cells_of(Buffer& buffer) {
  if (!buffer.cells) {
    void* const mapping = mmap(nullptr, bytes_of_cells(buffer), PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    buffer.cells = static_cast<Cell*>(mapping);
  }
  return buffer.cells;
}

void release(void* pointer) {
  const std::lock_guard<std::mutex> lock(buffers_mutex);
  const auto found = buffers().find(static_cast<char*>(pointer));
  last_found = nullptr;
  munmap(found->second.mapping, found->second.mapped);
  if (found->second.cells) munmap(found->second.cells, bytes_of_cells(found->second));
  buffers().erase(found);
}

Buffer* find_buffer(const char* address) {
  if (last_found && last_found->holds(address)) return last_found;
  auto after = buffers().upper_bound(address);
  if (after == buffers().begin()) return nullptr;
  Buffer& buffer = std::prev(after)->second;
  return buffer.holds(address) ? last_found = &buffer : nullptr;
}

std::string nearest_buffer(const char* address) {
  for (auto& [data, buffer] : buffers())
    if (address >= buffer.mapping && address < buffer.mapping + buffer.mapped)
      return "offset " + std::to_string(address - data) + " of a tensor's storage of " +
             std::to_string(buffer.bytes) + " bytes";
  return "no tensor's storage is near";
}

// After a launch: has anything beside a buffer been written?
void check_margins(const char* kernel) {
  const auto untouched = [](const char* begin, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i)
      if (static_cast<unsigned char>(begin[i]) != 0xff) return false;
    return true;
  };
  const std::lock_guard<std::mutex> lock(buffers_mutex);
  for (auto& [data, buffer] : buffers()) {
    const bool before = !untouched(data - buffer.margin_before, buffer.margin_before);
    if (!before && untouched(data + buffer.bytes, buffer.margin_after)) continue;
    buffer.margin_before = buffer.margin_after = 0;  // said once
    fail("kernel %s wrote just %s a tensor's storage of %zu bytes", kernel,
         before ? "before" : "past", buffer.bytes);
  }
}

// ---- shared memory ---------------------------------------------------------------------

void* dyn_smem() { return block->smem; }

uint32_t shared_address(const void* pointer) {
  const char* p = static_cast<const char*>(pointer);
  const Block& b = *block;
  if (p >= b.smem && p <= b.smem + b.smem_capacity)
    return static_cast<uint32_t>(p - b.smem) + kDynamicBase;
  const Launch& launch = *b.launch;
  if (p >= launch.static_smem && p <= launch.static_smem + launch.static_smem_bytes)
    return static_cast<uint32_t>(p - launch.static_smem) + kStaticBase;
  fail_at(EMULATOR_CALL_SITE, "%p is not in shared memory", pointer);
}

char* Block::shared_pointer(uint32_t address, size_t bytes, const char* what, void* call_site) {
  if (address >= kStaticBase) {
    const size_t offset = address - kStaticBase;
    if (offset + bytes > launch->static_smem_bytes)
      fail_at(call_site, "%s: 0x%x is outside of static shared memory", what, address);
    return launch->static_smem + offset;
  }
  if (address < kDynamicBase || address - kDynamicBase + bytes > smem_bytes)
    fail_at(call_site, "%s: bytes %ld to %ld of dynamic shared memory, of which there are %zu",
            what, static_cast<long>(address) - kDynamicBase,
            static_cast<long>(address + bytes) - kDynamicBase - 1, smem_bytes);
  return smem + (address - kDynamicBase);
}

}  // namespace emulator
