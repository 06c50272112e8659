// How the experts' work is cut up for threads and caches. No sum depends on where it was cut, so
// neither do the bits.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/ffn.h"
#include "cpu/kernels/kernels.h"

namespace moe_ext::cpu {

// Rows begin..end of one expert: as many as leave room in a core's cache for weights.
// `place` counts the rows of the blocks before it, each rounded up to whole kRowUnits.
struct RowBlock {
  int64_t expert, begin, end, place;

  int64_t rows() const { return end - begin; }
};

struct RowBlocks : std::vector<RowBlock> {
  int64_t height = 0;  // of the highest
  int64_t places = 0;

  RowBlocks(const Experts& experts, int64_t operand_bytes) {
    constexpr int64_t cache_bytes = int64_t(1) << 20;
    const int64_t fit = cache_bytes / (operand_bytes * std::max<int64_t>(experts.hidden, 1));
    const int64_t share = experts.kept / (2 * at::get_num_threads());
    const int64_t most = std::clamp<int64_t>(std::min(fit, share), 32, MC);
    const int32_t* offsets = experts.offsets();
    for (int64_t e = 0; e < experts.experts; ++e) {
      const int64_t first = offsets[e], count = offsets[e + 1] - first;
      const int64_t pieces = (count + most - 1) / most;
      for (int64_t i = 0; i < pieces; ++i) {
        const auto cut = [&](int64_t at) {
          return first + (at < pieces ? count * at / pieces / kRowUnit * kRowUnit : count);
        };
        push_back({e, cut(i), cut(i + 1), places});
        places += round_up(back().rows(), kRowUnit);
      }
    }
    // The largest first, so that no thread ends on a large one alone.
    std::stable_sort(begin(), end(),
                     [](const RowBlock& a, const RowBlock& b) { return a.rows() > b.rows(); });
    if (!empty()) height = front().rows();
  }
};

// Columns in blocks that leave a block of c in a core's cache, wider for fewer rows:
// a matrix is read along its rows, and long reads are what memory likes. `groups` groups
// of neighbouring blocks are the items, enough of them for all threads.
constexpr int64_t kNoSplit = int64_t(1) << 40;  // as the number of items: there are enough
struct ColumnBlocks {
  int64_t columns, unit, units, blocks, groups;

  // A block begins at a multiple of `unit`.
  ColumnBlocks(int64_t columns, int64_t rows, int64_t unit, int64_t items)
      : columns(columns), unit(unit), units((columns + unit - 1) / unit) {
    const int64_t most =
        std::clamp<int64_t>((1 << 15) / std::max<int64_t>(rows, 1), 256, NC) / unit;
    // A thread that ends early should find more to do.
    const int64_t wanted = 4 * at::get_num_threads();
    groups = std::clamp<int64_t>((wanted + items - 1) / std::max<int64_t>(items, 1), 1,
                                 std::max<int64_t>(units, 1));
    blocks = std::max((units + most - 1) / most, groups);
  }
  int64_t begin(int64_t b) const { return std::min(columns, units * b / blocks * unit); }

  template <class Body>
  void for_blocks(int64_t group, Body body) const {
    for (int64_t b = blocks * group / groups; b < blocks * (group + 1) / groups; ++b) {
      body(begin(b), begin(b + 1));
    }
  }
  int64_t widest() const { return std::min(columns, (units + blocks - 1) / blocks * unit); }
};

}  // namespace moe_ext::cpu
