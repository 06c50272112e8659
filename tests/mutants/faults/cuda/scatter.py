"""Plans."""

from mutants.fault import CHECKED, collection

FAULTS, faults = collection()

SCATTER = "tests/test_capacity_scatter.py::"

fault = faults("csrc/cuda/kernels/capacity_segments.cuh")
fault(
    "an id of E is an expert",
    "id < p.shape.num_experts ?",
    "id <= p.shape.num_experts ?",
    SCATTER + "test_many_segments",
)
fault(
    "an id below zero is an expert",
    "return id >= 0 && id <",
    "return id <",
    SCATTER + "test_ids_below_zero_are_sentinels_on_a_gpu",
)
fault(
    "an id of 64 bits is cut to 32",
    "const int64_t id = p.experts_are_int64",
    "const int32_t id = p.experts_are_int64",
    SCATTER + "test_huge_ids_are_sentinels",
)
fault(
    "a mask is read as if it were contiguous",
    "p.padding[a.token * p.padding_stride]",
    "p.padding[a.token]",
    SCATTER + "test_non_contiguous",
)
fault(
    "an id's offset has 32 bits",
    "const int64_t at = a.token * p.experts_token_stride + a.choice * p.experts_choice_stride;",
    "const int32_t at = a.token * p.experts_token_stride + a.choice * p.experts_choice_stride;",
    SCATTER + "test_strides_past_2_31",
)
fault(
    "a token's offset in the mask has 32 bits",
    "p.padding[a.token * p.padding_stride]",
    "p.padding[static_cast<int32_t>(a.token * p.padding_stride)]",
    SCATTER + "test_strides_past_2_31",
)
fault(
    "a sequence's last segment runs on into the next sequence",
    "min(begin + s.segment_size, end_of_sequence),",
    "begin + s.segment_size,",
    SCATTER + "test_many_segments",
)
fault(
    "a segment's last steps take what the next segment has",
    "a < end ? expert_of",
    "a < p.shape.assignments ? expert_of",
    SCATTER + "test_many_segments",
)

fault = faults("csrc/cuda/kernels/capacity_scatter.cu")
fault(
    "lanes count before the counters are zero",
    "counters[j * stride + e] = 0;\n  }\n  __syncwarp();\n",
    "counters[j * stride + e] = 0;\n  }\n",
    SCATTER + "test_many_segments",
)
fault(
    "counters are copied before the last lane has counted",
    "  __syncwarp();\n  if (counters_in_smem) {",
    "  if (counters_in_smem) {",
    SCATTER + "test_many_segments",
)
fault(
    "all choices are counted in the first one's cell",
    "const int64_t choice = p.shape.choices > 1 ? batch.assignments[i].choice : 0;",
    "const int64_t choice = 0;",
    SCATTER + "test_many_segments",
)
fault(
    "the ticket is not reset",
    "if (blockIdx.x == 0 && lane == 0) *p.ticket = 0;",
    "",
    SCATTER + "test_drop_orders",
)
fault(
    "a lane counts itself among those before it",
    "lanes & ((1u << threadIdx.x) - 1)",
    "lanes & ((2u << threadIdx.x) - 1)",
    SCATTER + "test_drop_orders",
)
fault(
    "the next row is looked up before it has moved",
    "next[expert] += rank.count;\n  __syncwarp();\n",
    "next[expert] += rank.count;\n",
    SCATTER + "test_many_segments[1-None-skewed-token]",
    CHECKED,
)
fault(
    "the tail's assignments are left as they were",
    "    p.row_token[row] = -1;\n    p.row_assignment[row] = -1;\n",
    "    p.row_token[row] = -1;\n",
    SCATTER + "test_many_segments",
)
fault(
    "places that are taken stay free",
    "left_in[cell] = max(left - rank.count, 0);",
    "left_in[cell] = left;",
    SCATTER + "test_many_segments",
)
fault(
    "places are taken before the others have looked",
    "  __syncwarp();  // all lanes have read how many are left\n",
    "",
    SCATTER + "test_many_segments",
)
fault(
    "the next row moves before the others have theirs",
    "  __syncwarp();  // all lanes have read which is next\n",
    "",
    SCATTER + "test_many_segments",
)
fault(
    "rows are taken before all counters are loaded",
    "  __syncwarp();  // rows and places are there\n",
    "",
    SCATTER + "test_many_segments[1-150-skewed-token]",
    CHECKED,
)
fault(
    "entries of the list are taken before all counters are loaded",
    "  __syncwarp();  // the entries are there\n",
    "",
    SCATTER + "test_many_segments[1-150-skewed-probs]",
    CHECKED,
)
fault(
    "an assignment without a place takes a row",
    "if (!take_place(places.left, cell)) expert = -1;",
    "take_place(places.left, cell);",
    SCATTER + "test_many_segments",
)
fault(
    "warps without shared counters share one set",
    ": p.next_row + blockIdx.x * s.num_experts;",
    ": p.next_row;",
    SCATTER + "test_many_experts",
)

fault = faults("csrc/cuda/kernels/capacity_number.cuh")
fault(
    "parts are overwritten while others read them",
    "  __syncthreads();  // earlier reads of `parts` are done\n",
    "",
    SCATTER + "test_many_segments",
)
fault(
    "shares are rounded down and leave the last cells out",
    "max((count + kGroups - 1) / kGroups, int64_t{1})",
    "max(count / kGroups, int64_t{1})",
    SCATTER + "test_many_segments",
)
fault(
    "places do not begin anew with a sequence",
    "    if (until_start == 0) seen = 0, until_start = of_sequence;\n",
    "",
    SCATTER + "test_many_segments",
)
fault(
    "a full expert owes places",
    "min(count, max(p.capacity - seen, 0))",
    "min(count, p.capacity - seen)",
    SCATTER + "test_many_segments",
)
fault(
    "a share forgets its sequence's earlier shares",
    "group = start / mine.size; group < threadIdx.y",
    "group = threadIdx.y; group < threadIdx.y",
    SCATTER + "test_many_segments",
)
fault(
    "cells are read before their share has written them",
    "  __syncthreads();  // another share's cells are read next\n",
    "",
    SCATTER + "test_many_segments",
)
fault(
    "parts are added up before all are there",
    "  parts[threadIdx.y][threadIdx.x] = value;\n  __syncthreads();\n",
    "  parts[threadIdx.y][threadIdx.x] = value;\n",
    SCATTER + "test_many_segments",
)
fault(
    "what shares leave behind overwrites sums that others still read",
    "  sum_below(parts, all, total);\n  __syncthreads();\n",
    "  sum_below(parts, all, total);\n",
    SCATTER + "test_many_segments",
)
fault(
    "what shares leave behind is read before it is there",
    "since_start;\n  __syncthreads();\n",
    "since_start;\n",
    SCATTER + "test_many_segments",
)
fault(
    "a block draws its ticket before its threads have written",
    "  __syncthreads();\n  if (threadIdx.x == 0 && threadIdx.y == 0) {",
    "  if (threadIdx.x == 0 && threadIdx.y == 0) {",
    SCATTER + "test_many_segments",
)
fault(
    "a block's sums are not shown to the others before it draws its ticket",
    "    __threadfence();\n    is_last",
    "    is_last",
    SCATTER + "test_many_segments[1-150-skewed-token]",
    CHECKED,
)
fault(
    "the last block sums up what it saw before it drew its ticket",
    "gridDim.x) - 1;\n    __threadfence();\n",
    "gridDim.x) - 1;\n",
    SCATTER + "test_many_segments[1-150-skewed-token]",
    CHECKED,
)
fault(
    "sums of warps are added up before all are there",
    "warp_sums[warp] = sum;\n    __syncthreads();\n",
    "warp_sums[warp] = sum;\n",
    SCATTER + "test_many_experts[1500-1-token]",
)
fault(
    "the second 512 experts begin at row 0",
    "    before += total;\n",
    "",
    SCATTER + "test_many_experts[1500-1-token]",
)
fault(
    "sums of the next experts overwrite these",
    "    __syncthreads();  // the next sums take the place of these\n",
    "",
    SCATTER + "test_many_experts[7000-4-token]",
)
fault(
    "the block looks for the last ticket before it is drawn",
    "  __syncthreads();\n  return is_last;",
    "  return is_last;",
    SCATTER + "test_many_segments",
)

fault = faults("csrc/cuda/kernels/capacity_choose.cuh")
fault(
    "NaN is the largest weight",
    "  if ((bits & ~sign) > infinity) bits = sign | infinity;\n",
    "",
    SCATTER + "test_weights_of_any_dtype_with_ties_and_nan",
)
fault(
    "a weight's offset has 32 bits",
    "const int64_t at = a.token * p.weights_token_stride + a.choice * p.weights_choice_stride;",
    "const int32_t at = a.token * p.weights_token_stride + a.choice * p.weights_choice_stride;",
    SCATTER + "test_strides_past_2_31",
)
fault(
    "-0 is less than 0",
    "  if (bits == sign) bits = 0;\n",
    "",
    SCATTER + "test_weights_of_any_dtype_with_ties_and_nan",
)
fault(
    "weights below zero rise with their magnitude",
    "bits & sign ? ~bits & (sign | (sign - 1)) : bits | sign",
    "bits & sign ? bits & (sign - 1) : bits | sign",
    SCATTER + "test_weights_that_differ_in_every_digit",
)
fault(
    "all of a tie stay",
    "const bool kept = above || (tied && ties_below < threshold.ties);",
    "const bool kept = above || tied;",
    SCATTER + "test_weights_of_any_dtype_with_ties_and_nan",
)
fault(
    "the smallest digit is taken first",
    "const int digit = kDigits - 1 - static_cast<int>(threadIdx.x);",
    "const int digit = static_cast<int>(threadIdx.x);",
    SCATTER + "test_weights_that_differ_in_every_digit",
)
fault(
    "a key's digits are put together in 32 bits",
    "static_cast<uint64_t>(found_digit) << shift",
    "static_cast<uint32_t>(found_digit) << shift % 32",
    SCATTER + "test_weights_that_differ_in_every_digit",
)
fault(
    "a thread counts in a digit that is not zero yet",
    "    histogram[threadIdx.x] = 0;\n    __syncthreads();\n",
    "    histogram[threadIdx.x] = 0;\n",
    SCATTER + "test_weights_that_differ_in_every_digit",
)
fault(
    "a digit is read before all threads have counted",
    "    __syncthreads();\n    const int digit =",
    "    const int digit =",
    SCATTER + "test_weights_that_differ_in_every_digit",
)
fault(
    "the digit is read before it is found",
    "    __syncthreads();\n    threshold.key |=",
    "    threshold.key |=",
    SCATTER + "test_weights_that_differ_in_every_digit",
)
fault(
    "a warp's sum is overwritten while others read it",
    "  __syncthreads();  // earlier reads of `warp_sums` are done\n",
    "",
    SCATTER + "test_weights_that_differ_in_every_digit",
)
fault(
    "warps' sums are added up before all are there",
    "warp_sums[warp] = sum;\n  __syncthreads();\n",
    "warp_sums[warp] = sum;\n",
    SCATTER + "test_weights_that_differ_in_every_digit",
)
fault(
    "the second 256 of a bucket take the rows of the first",
    "row += (total & 0xffff) + ties;",
    "row += 0 * ties;",
    SCATTER + "test_weights_that_differ_in_every_digit",
)
fault(
    "every 256 of a bucket take the whole tie",
    "      threshold.ties -= ties;\n",
    "",
    SCATTER + "test_many_segments",
)
fault(
    "buckets past the grid are left out",
    "b < s.num_experts * s.num_sequences; b += gridDim.x",
    "b < gridDim.x; b += gridDim.x",
    SCATTER + "test_many_experts[7000-4-probs]",
)
fault(
    "a bucket ends where the expert does",
    "sequence + 1 < s.num_sequences\n",
    "false\n",
    SCATTER + "test_many_segments",
)
