// capacity_scatter on a GPU: what csrc/cuda's op tells the kernels. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "dtypes.h"

namespace moe_ext::cuda {

// Which assignments stay in a full expert; kNone: all, as none is full.
enum class DropOrder { kNone, kChoice, kToken, kProbs };

// How the assignments are cut up: every sequence into segments of neighbours, each of
// them a warp's. A cell counts one expert's assignments in a segment; with kChoice, those
// of one choice j. The host decides by sizes alone.
struct ScatterShape {
  int64_t num_experts, num_sequences;
  DropOrder order;
  int64_t assignments, sequence_size, segment_size;
  int64_t segments_per_sequence, segments;
  int64_t choices;  // cells an expert has in a segment: K with kChoice, else 1
  int64_t cells;    // ... and in all segments
  // A warp counts each expert's rows and each cell's places; with many experts it does so
  // in the workspace.
  int64_t counter_bytes;
  bool counters_in_smem;

  // int32 numbers that the kernels need for themselves.
  int64_t workspace_size() const {
    int64_t size = 1 + (segments + cells) * num_experts;
    if (!counters_in_smem) size += segments * num_experts;
    if (order == DropOrder::kProbs) size += num_experts + 1 + assignments;
    return size;
  }
};

inline ScatterShape scatter_shape(int64_t tokens, int64_t top_k, int64_t num_experts,
                                  int64_t num_sequences, DropOrder order) {
  // Enough segments to fill a GPU, few enough that the cells are not the larger part of
  // the work. A sequence has at least one.
  constexpr int64_t kShortest = 256, kSegments = 1024, kCells = 2048;
  constexpr int64_t kMaxCounterBytes = 48 * 1024;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  ScatterShape shape{};
  shape.num_experts = num_experts;
  shape.num_sequences = num_sequences;
  shape.order = order;
  shape.assignments = tokens * top_k;
  shape.sequence_size = shape.assignments / num_sequences;
  shape.choices = order == DropOrder::kChoice ? std::max<int64_t>(top_k, 1) : 1;
  const int64_t wanted =
      std::min({ceil_div(shape.assignments, kShortest), kSegments, kCells / shape.choices,
                2 * shape.assignments / shape.choices / num_experts});
  shape.segments_per_sequence = std::max<int64_t>(ceil_div(wanted, num_sequences), 1);
  shape.segment_size = ceil_div(shape.sequence_size, shape.segments_per_sequence);
  shape.segments = shape.segments_per_sequence * num_sequences;
  shape.cells = shape.segments * shape.choices;
  shape.counter_bytes = (1 + shape.choices) * num_experts * static_cast<int64_t>(sizeof(int32_t));
  shape.counters_in_smem = shape.counter_bytes <= kMaxCounterBytes;
  return shape;
}

struct CapacityScatter {
  ScatterShape shape;
  int64_t top_k, rows;  // K, R
  int32_t capacity;     // C; any but with kNone

  // (T, K), element (t, j) at data + t * token_stride + j * choice_stride. An id that is
  // not in 0..E-1 is a sentinel.
  const void* experts;
  bool experts_are_int64;
  int64_t experts_token_stride, experts_choice_stride;
  const bool* padding;  // (T), or null
  int64_t padding_stride;
  const void* weights;  // (T, K); read with kProbs only
  Dtype weights_dtype;
  int64_t weights_token_stride, weights_choice_stride;

  int32_t* expert_offsets;  // (E+1)
  int32_t* row_token;       // (R)
  int32_t* row_assignment;  // (R)
  int32_t* assignment_row;  // (T, K)
  int32_t* expert_counts;   // (E)

  // The workspace: see set_workspace.
  int32_t* ticket;       // how many blocks are through with `number`
  int32_t* first_row;    // (segments, E): each segment's first row within the expert
  int32_t* cells;        // (sequences, choices, segments of a sequence, E): counts; after
                         // `admit` how many of them stay, or (kProbs) begins in the list
  int32_t* next_row;     // (segments, E), unless the counters are in shared memory
  int32_t* all_offsets;  // kProbs: (E+1), expert_offsets as if nothing were dropped
  int32_t* list;         // kProbs: (T*K) assignments in expert order

  void set_workspace(int32_t* workspace) {
    ticket = workspace;
    first_row = ticket + 1;
    cells = first_row + shape.segments * shape.num_experts;
    next_row = cells + shape.cells * shape.num_experts;
    all_offsets = next_row + (shape.counters_in_smem ? 0 : shape.segments * shape.num_experts);
    list = all_offsets + shape.num_experts + 1;
  }
};

cudaError_t capacity_scatter(const CapacityScatter& scatter, cudaStream_t stream);

}  // namespace moe_ext::cuda
