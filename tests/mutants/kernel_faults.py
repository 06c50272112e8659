"""The planted faults of the CUDA kernels; the emulated suite must catch each of them.

A fault that only some schedules show names `--emulator-seeds` among its tests. One that no
schedule shows is CHECKED: the emulator makes a warp's lanes wait for each other wherever they
exchange something, and sees memory as everybody wrote it last; a GPU promises neither. The
checked build knows what was promised.

Every barrier, fence and wait of the kernels has its fault.
"""

from mutants.faults import faults

KERNEL_FAULTS = []
CHECKED = "--emulator-build=checked"

# ---- topk_route ---------------------------------------------------------------

ROUTE = "tests/test_topk_route.py::"

fault = faults("csrc/cuda/kernels/topk_route.cu", into=KERNEL_FAULTS)
fault(
    "teams count before the counts are cleared",
    "  __syncthreads();  // any team may count any expert",
    "",
    ROUTE + "test_token_blocks",
    "--emulator-seeds=4",
)
fault(
    "warp adds to warp without a barrier",
    "    __syncthreads();  // the last one: also for the counts",
    "",
    ROUTE + "test_token_blocks",
    "--emulator-seeds=4",
)
fault(
    "of a warp's small teams, every other one's sums are lost",
    "distance = Team::kLanes; distance < kWarpSize",
    "distance = 2 * Team::kLanes; distance < kWarpSize",
    ROUTE + "test_token_blocks",
)
fault(
    "padding is summed",
    "    if (present) {\n",
    "    if (is_token) {\n",
    ROUTE + "test_padding",
)
fault(
    "padding chooses experts",
    "if (round == j && present) mine = id;",
    "if (round == j) mine = id;",
    ROUTE + "test_padding",
)
fault(
    "the selection bias does not choose",
    "key_of(score[slot] + bias)",
    "key_of(score[slot])",
    ROUTE + "test_selection_bias_chooses_and_does_not_weigh",
)
fault(
    "a lane's first choice is its last",
    "if (chunk == 0) first = mine;",
    "first = mine;",
    ROUTE + "test_sizes",
)
fault(
    "blocks past the 32nd are not added up",
    "block < p.grid.blocks; block += kWarpSize",
    "block < p.grid.blocks; block += p.grid.blocks",
    ROUTE + "test_many_tokens",
)
fault(
    "the blocks' sums are added up before all are there",
    "  counts[row][column] = count;\n  __syncthreads();",
    "  counts[row][column] = count;",
    ROUTE + "test_token_blocks",
    "--emulator-seeds=2",
)

fault = faults("csrc/cuda/kernels/route_grid.cuh", into=KERNEL_FAULTS)
fault(
    "the last block goes on past the last token",
    "end(begin + grid.tokens_per_block < tokens ? begin + grid.tokens_per_block : tokens)",
    "end(begin + grid.tokens_per_block + 0 * tokens)",
    ROUTE + "test_token_blocks",
)
fault(
    "the blocks' long rows overlap",
    "blockIdx.x * kRows * row_size",
    "blockIdx.x * row_size",
    ROUTE + "test_long_rows[dtype1-1100]",
    CHECKED,
)

fault = faults("csrc/cuda/kernels/route_row.cuh", into=KERNEL_FAULTS)
fault(
    "slots past E hold zeros",
    "value[slot + i] = i < left ? four[i] : -kInfinity<A>;",
    "value[slot + i] = four[i];",
    ROUTE + "test_sizes",
)
fault(
    "an id below 0 is the first expert",
    "return id < 0 ? num_experts :",
    "return id < 0 ? 0 :",
    ROUTE + "test_ids_below_zero",
)
fault(
    "a team's sum leaves out every other lane",
    "distance > 0; distance /= 2)\n      x += __shfl_xor_sync",
    "distance > 1; distance /= 2)\n      x += __shfl_xor_sync",
    ROUTE + "test_sizes",
)

fault = faults("csrc/cuda/kernels/topk_choice.cuh", into=KERNEL_FAULTS)
fault(
    "in a small team, a tie goes to the higher id",
    "(other == best && other_id < id)",
    "(other == best && other_id > id)",
    ROUTE + "test_sizes",
)
fault(
    "in a warp, a tie goes to the higher id",
    "__reduce_min_sync(kFullWarp, best == largest ? id : kLargestId)",
    "__reduce_max_sync(kFullWarp, best == largest ? id : -1)",
    ROUTE + "test_sizes",
)
fault(
    "a NaN logit ranks as a number of its bits",
    "(x == x ? x : -kInfinity<A>)",
    "(x)",
    ROUTE + "test_nan_bias_ranks_last",
)
fault(
    "the best of a group counts as its second best, too",
    "second = x > first ? first : x > second ? x : second;",
    "second = x > second ? x : second;",
    ROUTE + "test_groups",
)
fault(
    "groups are scored before all of their keys are there",
    "  __syncwarp();\n  for (int g = team.lane; g < n_group; g += Team::kLanes) {\n    Key<A> first",
    "  for (int g = team.lane; g < n_group; g += Team::kLanes) {\n    Key<A> first",
    ROUTE + "test_groups",
    ROUTE + "test_long_rows",
    "--emulator-seeds=2",
)
fault(
    "groups are compared before all have a score",
    "  __syncwarp();\n  // A group is kept",
    "  // A group is kept",
    ROUTE + "test_groups",
    ROUTE + "test_long_rows",
    "--emulator-seeds=2",
)
fault(
    "experts look for their group's verdict before it is there",
    "  __syncwarp();\n#pragma unroll\n  for (int slot = 0; slot < team.slots(); ++slot) {\n    const int e",
    "#pragma unroll\n  for (int slot = 0; slot < team.slots(); ++slot) {\n    const int e",
    ROUTE + "test_groups",
    ROUTE + "test_long_rows",
    "--emulator-seeds=2",
)
fault(
    "the next token's keys come while a lane looks for its group's verdict",
    "  __syncwarp();  // the team's next token overwrites both\n",
    "",
    ROUTE + "test_many_tokens[66-groups2]",
    CHECKED,
)

fault = faults("csrc/cuda/kernels/topk_route_backward.cu", into=KERNEL_FAULTS)
fault(
    "the normalisation counts as a constant",
    "const A d = g(j) - inner;",
    "const A d = g(j);",
    ROUTE + "test_each_gradient_alone",
)
fault(
    "score_sums' gradient misses the normalisation of sigmoid scores",
    "(gradient[slot] - mean) * row.score_share",
    "gradient[slot] * row.score_share",
    ROUTE + "test_each_gradient_alone",
)
fault(
    "the teams of a warp hear each other's choices",
    "__shfl_sync(kFullWarp, dmine, i, Team::kLanes)",
    "__shfl_sync(kFullWarp, dmine, i)",
    ROUTE + "test_each_gradient_alone",
)
fault(
    "in a long row, an expert chosen twice has the last choice's gradient",
    "gradient[id / Team::kLanes] += d;",
    "gradient[id / Team::kLanes] = d;",
    ROUTE + "test_long_rows",
)
fault(
    "padding gets a gradient",
    "p.dtype, t * E, present, gradient)",
    "p.dtype, t * E, true, gradient)",
    ROUTE + "test_padding",
)

# ---- router_logits ------------------------------------------------------------

LOGITS = "tests/test_router_logits.py::"

fault = faults("csrc/cuda/kernels/router_logits.cu", into=KERNEL_FAULTS)
fault(
    "a step is multiplied before all of it has arrived",
    "    if (more) store(stage ^ 1);  // all are past the step that read it\n    __syncthreads();",
    "    if (more) store(stage ^ 1);",
    LOGITS + "test_hidden_sizes",
    "--emulator-seeds=2",
)
fault(
    "the first step is multiplied before all of it has arrived",
    "  __syncthreads();\n  int stage = 0;",
    "  int stage = 0;",
    LOGITS + "test_hidden_sizes",
    "--emulator-seeds=2",
)
fault(
    "a slab forgets the ones before",
    "total[r][c] += sum[r][c];",
    "total[r][c] = sum[r][c];",
    LOGITS + "test_slabs_of_one_block",
)
fault(
    "rows past the last are read",
    "(r < rows ? end_k - k : 0)",
    "(end_k - k)",
    LOGITS + "test_tiles",
)
fault(
    "the parts' sum has no bias",
    "const A bias = p.bias ? load_as<A>(p.bias, p.bias_dtype, index % p.n) : A(0);",
    "const A bias = 0;",
    LOGITS + "test_hidden_sizes",
)
fault(
    "the bias's gradient is written past the last expert",
    "if (lane > 0 || c >= n) return;",
    "if (lane > 0) return;",
    LOGITS + "test_tiles",
)
fault(
    "the bias's gradient is added up before all rows are in",
    "  sums[lane][column] = sum;\n  __syncthreads();",
    "  sums[lane][column] = sum;",
    LOGITS + "test_backward_slabs",
    "--emulator-seeds=2",
)

# ---- accumulate_stats -----------------------------------------------------------

fault = faults(
    "csrc/cuda/kernels/accumulate_stats.cu", "tests/test_accumulate_stats.py", into=KERNEL_FAULTS
)
fault(
    "a sentinel counts as an assignment",
    "    if (ids.at(a, E) >= E) continue;\n",
    "",
)
fault(
    "the warps' parts are added up before all are there",
    "parts[warp] = own;\n  __syncthreads();",
    "parts[warp] = own;",
)
fault(
    "the block's parts are added up without a barrier",
    "half /= 2) {\n    __syncthreads();",
    "half /= 2) {",
)
fault(
    "blocks past the 256th are not added up",
    "block < p.blocks; block += kThreads",
    "block < p.blocks; block += p.blocks",
)
fault(
    "padding counts",
    "if (p.padding && p.padding[t]) continue;",
    "",
)
fault(
    "the first maximum does not replace the zero of a fresh start",
    "total[kForwards] > 0 ? total[kMaxLogit] : -kInfinity<double>;",
    "total[kMaxLogit];",
    "tests/test_accumulate_stats.py::test_a_maximum_below_zero",
)

# ---- capacity_scatter ---------------------------------------------------------

SCATTER = "tests/test_capacity_scatter.py::"

fault = faults("csrc/cuda/kernels/capacity_segments.cuh", into=KERNEL_FAULTS)
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

fault = faults("csrc/cuda/kernels/capacity_scatter.cu", into=KERNEL_FAULTS)
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
    "nobody resets the ticket",
    "if (blockIdx.x == 0 && lane == 0) *p.ticket = 0;",
    "",
    SCATTER + "test_drop_orders",
)
fault(
    "shares are rounded down and leave the last cells out",
    "max((count + kScanGroups - 1) / kScanGroups, int64_t{1})",
    "max(count / kScanGroups, int64_t{1})",
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
    "parts are overwritten while others read them",
    "  __syncthreads();  // whoever used `parts` before is done\n",
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
fault(
    "a lane counts itself among those before it",
    "lanes & ((1u << threadIdx.x) - 1)",
    "lanes & ((2u << threadIdx.x) - 1)",
    SCATTER + "test_drop_orders",
)
fault(
    "places that are taken stay free",
    "places[cell] = max(left - rank.count, 0);",
    "places[cell] = left;",
    SCATTER + "test_many_segments",
)
fault(
    "places are taken before the others have looked",
    "  __syncwarp();  // everybody has seen how many are left\n",
    "",
    SCATTER + "test_many_segments",
)
fault(
    "the next row moves before the others have theirs",
    "  __syncwarp();  // everybody has seen which is next\n",
    "",
    SCATTER + "test_many_segments",
)
fault(
    "the next row is looked up before it has moved",
    "next[expert] += rank.count;\n  __syncwarp();\n",
    "next[expert] += rank.count;\n",
    SCATTER + "test_many_segments[1-None-skewed-token]",
    CHECKED,
)
fault(
    "rows are taken before all counters are loaded",
    "  __syncwarp();\n  return counters;",
    "  return counters;",
    SCATTER + "test_many_segments[1-150-skewed-token]",
    CHECKED,
)
fault(
    "who found no place takes a row",
    "if (!take_place(counters.places, cell)) expert = -1;",
    "take_place(counters.places, cell);",
    SCATTER + "test_many_segments",
)
fault(
    "the tail's assignments are left as they were",
    "    p.row_token[row] = -1;\n    p.row_assignment[row] = -1;\n",
    "    p.row_token[row] = -1;\n",
    SCATTER + "test_many_segments",
)
fault(
    "warps without shared counters share one set",
    "Counters counters{p.next_row + blockIdx.x * s.num_experts,",
    "Counters counters{p.next_row,",
    SCATTER + "test_many_experts",
)

fault = faults("csrc/cuda/kernels/capacity_choose.cuh", into=KERNEL_FAULTS)
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
    "a digit is read before everybody has counted",
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
    "  __syncthreads();  // whoever used `warp_sums` before is done\n",
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

# ---- weighted_combine and gather_rows -----------------------------------------

COMBINE = "tests/test_weighted_combine.py::"
GATHER = "tests/test_gather_rows.py::"

fault = faults("csrc/cuda/kernels/weighted_combine.cu", into=KERNEL_FAULTS)
fault(
    "a row past the last is read",
    "return row >= 0 && row < plan.rows ? row : -1;",
    "return row;",
    COMBINE + "test_a_row_past_the_last_counts_as_dropped",
)
fault(
    "a batch of rows runs on into the next token's",
    "  if (j >= plan.top_k) return -1;\n",
    "",
    COMBINE + "test_top_k",
)
fault(
    "the token past the last has work",
    "  if (token >= plan.tokens) return;\n  const int64_t stride",
    "  const int64_t stride",
    COMBINE + "test_hidden_sizes",
)
fault(
    "a sum's weights are forgotten",
    "sum[i] += weight[b] * static_cast<A>",
    "sum[i] += static_cast<A>",
    COMBINE + "test_top_k",
)
fault(
    "a token's rows are summed from the last",
    "row[b] = row_of(plan, token, first + b);\n#pragma",
    "row[b] = row_of(plan, token, plan.top_k - 1 - (first + b));\n#pragma",
    GATHER + "test_k_is_summed_in_order",
)
fault(
    "a summed row's offset has 32 bits",
    "      for (int b = 0; b < kBatch; ++b) {\n"
    "        if (row[b] >= 0) value[b] = load_pack<T, N>(p.rows, row[b] * plan.hidden + column);",
    "      for (int b = 0; b < kBatch; ++b) {\n"
    "        const int32_t at = row[b] * plan.hidden + column;\n"
    "        if (row[b] >= 0) value[b] = load_pack<T, N>(p.rows, at);",
    COMBINE + "test_more_than_2_31_elements",
)
fault(
    "an inner product's offset has 32 bits",
    "          for (int b = 0; b < kBatch; ++b) {\n"
    "            if (row[b] >= 0) value[b] = load_pack<T, N>(p.rows, row[b] * plan.hidden + column);",
    "          for (int b = 0; b < kBatch; ++b) {\n"
    "            const int32_t at = row[b] * plan.hidden + column;\n"
    "            if (row[b] >= 0) value[b] = load_pack<T, N>(p.rows, at);",
    COMBINE + "test_more_than_2_31_elements",
)
fault(
    "the gradient of a row misses its weight",
    "scaled(dy, weight[b])",
    "scaled(dy, A(1))",
    COMBINE + "test_top_k",
)
fault(
    "an inner product forgets its earlier chunks",
    "total[b] += part[b];",
    "total[b] = part[b];",
    COMBINE + "test_long_rows",
)
fault(
    "the butterfly leaves out half of the lanes",
    "for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2)",
    "for (int lanes = kWarpSize / 4; lanes > 0; lanes /= 2)",
    COMBINE + "test_hidden_sizes",
)
fault(
    "rows of nobody keep what was there",
    "if (p.row_owner[row] >= 0) continue;",
    "continue;",
    GATHER + "test_routings",
)
fault(
    "a token looks at one row of nobody",
    "row < plan.rows; row += plan.tokens",
    "row < plan.rows; row += plan.rows",
    GATHER + "test_routings",
)
fault(
    "columns past the last are read",
    "        if (column >= plan.hidden) break;\n",
    "",
    COMBINE + "test_hidden_sizes",
)
fault(
    "packs are read from views that begin between them",
    "packed &= reinterpret_cast<uintptr_t>(matrix) % kMaxPackBytes == 0;",
    "packed &= matrix != nullptr || packed;",
    COMBINE + "test_unaligned",
    GATHER + "test_unaligned",
)
fault(
    "packs are read of rows that are no whole number of them",
    "bool packed = plan.hidden * size_of(plan.dtype) % kMaxPackBytes == 0;",
    "bool packed = true;",
    COMBINE + "test_hidden_sizes",
)
fault(
    "float64 weights of narrower rows are summed in float32",
    "if (plan.accumulate == Dtype::f64) return",
    "if (false) return",
    COMBINE + "test_float64_weights",
)

# ---- the experts: tiles on tensor cores -------------------------------------------

TENSOR_CORES = "tests/test_ffn_kernels.py::TestTensorCores::"
TILE = TENSOR_CORES + "test_tiles[64-layout0]"
INTERLEAVED = TENSOR_CORES + "test_tiles[32-layout2]"
ODD = TENSOR_CORES + "test_activations[False-geglu]"
MANY_ORDERS = TENSOR_CORES + "test_same_bits[False-dtype0]"
BESIDE = TENSOR_CORES + "test_what_is_beside_an_operand_is_not_read[False-dtype0]"

fault = faults("csrc/cuda/kernels/grouped_gemm_sm80.cuh", TILE, into=KERNEL_FAULTS)
fault(
    "a stage is read while its copies are under way",
    "ptx::cp_async_wait<kStages - 2>();",
    "ptx::cp_async_wait<kStages - 1>();",
    TILE,
    "--emulator-seeds=4",
)
fault(
    "a stage is read before other threads' copies into it are known to have landed",
    "ptx::cp_async_wait<kStages - 2>();\n      __syncthreads();",
    "ptx::cp_async_wait<kStages - 2>();",
)
fault(
    "the stage that is being read is filled",
    "load_a.load(smem.a[empty]);",
    "load_a.load(smem.a[full]);",
)
fault(
    "the ring of stages turns one too early",
    "full = full + 1 == kStages ? 0 : full + 1;",
    "full = full + 2 == kStages ? 0 : full + 1;",
)
fault(
    "the last tile of k is not copied",
    "if (tile + kStages - 1 < depth) {",
    "if (tile + kStages < depth) {",
)
fault(
    "no group is committed where k has fewer tiles than there are stages",
    "load_b.load(smem.b[stage]);\n      }\n      ptx::cp_async_commit();",
    "load_b.load(smem.b[stage]);\n        ptx::cp_async_commit();\n      }",
    TILE,
    "--emulator-seeds=4",
)
fault(
    "no group is committed where k has no further tile",
    "load_b.load(smem.b[empty]);\n      }\n      ptx::cp_async_commit();",
    "load_b.load(smem.b[empty]);\n        ptx::cp_async_commit();\n      }",
    TILE,
    "--emulator-seeds=4",
)
fault(
    "accumulators go where a slower warp still reads its operands",
    "    __syncthreads();  // from here on",
    "    // from here on",
    MANY_ORDERS,
)
fault(
    "staged rows are read before all warps have written them",
    "__syncthreads();\n#pragma unroll 1\n      for (int i = threadIdx.x; i < kStagedRows",
    "#pragma unroll 1\n      for (int i = threadIdx.x; i < kStagedRows",
)
fault(
    "the second 128 rows of a tile are staged over the first",
    "if (first) __syncthreads();",
    "",
    TENSOR_CORES + "test_tiles[256-layout0]",
)
fault(
    "a tile writes rows that it does not have",
    "const bool exists = row < tile.rows && column < e.columns;",
    "const bool exists = column < e.columns;",
)
fault(
    "gate and up exchanged, interleaved",
    "value[i] = low[2 * i], up[i] = low[2 * i + 1];",
    "up[i] = low[2 * i], value[i] = low[2 * i + 1];",
    INTERLEAVED,
)
fault(
    "up's half of the tile is the gate's again",
    "return {i + (n < kTileN / 2 ? 0 : half), half - i};",
    "return {i, half - i};",
)
fault(
    "every tile of columns puts its part of dS in the same place",
    "[tile.column_tile * context.rows + r] = score",
    "[r] = score",
    ODD,
)
fault(
    "dS misses half of a tile's columns",
    "for (int d = kTileN / 16; d > 0",
    "for (int d = kTileN / 32; d > 0",
)
fault(
    "every expert's weight gradient begins at the first row",
    "(x.index ? 0 : begin * row_bytes)",
    "0",
)
fault(
    "every expert's weight gradient gathers from the first row",
    "x.index ? x.index + begin : nullptr",
    "x.index",
)

fault = faults("csrc/cuda/kernels/grouped_gemm_sm80.cu", into=KERNEL_FAULTS)
fault(
    "rows that begin between 16 bytes are copied by 16 bytes",
    "return is_aligned(rows.data) && is_aligned(rows.stride",
    "return is_aligned(rows.stride",
    TENSOR_CORES + "test_what_is_not_aligned",
)
fault(
    "float32 is multiplied in tf32, asked or not",
    "(context.dtype == Dtype::f32 && context.allow_tf32)",
    "context.dtype == Dtype::f32",
    TENSOR_CORES + "test_float32_is_not_rounded_unasked",
)

fault = faults("csrc/cuda/kernels/operand_tiles.cuh", TILE, into=KERNEL_FAULTS)
fault(
    "k's tail is a chunk too long",
    "chunks_left_ = k_bytes / 16 - chunk;",
    "chunks_left_ = k_bytes / 16 - chunk + 1;",
    BESIDE,
)
fault(
    "a weight gradient takes rows of the next expert",
    "column_ + from * row_bytes_, k < rows_ ? 16 : 0);",
    "column_ + from * row_bytes_, 16);",
)
fault(
    "a gathered tile takes the rows of the one before",
    "row_ += Tile::kRows;\n    if (kIndexed) look_up();",
    "row_ += Tile::kRows;",
)
fault(
    "the quarters of B come in the order of A's",
    "kSide == Side::kA ? lane / 8 % 2 : lane / 16;",
    "lane / 8 % 2;",
)

fault = faults("csrc/cuda/kernels/tiles.cuh", TILE, into=KERNEL_FAULTS)
fault(
    "the sum over experts wraps around the warp",
    "if (lane >= d) value += below;",
    "value += below;",
)
fault(
    "of a lane's share of the experts, those past the 32nd are not looked through",
    "      before = __shfl_sync(kFullWarp, end_e, kWarpSize - 1);\n      continue;\n",
    "      return {-1, 0, 0, 0};\n",
    TENSOR_CORES + "test_thousands_of_experts",
)
fault(
    "the last row tiles of an expert walk as if there were sixteen",
    "const int together = min(row_tiles - first, kRowTilesTogether);",
    "const int together = kRowTilesTogether;",
    TENSOR_CORES + "test_many_tiles_of_one_expert",
)
fault(
    "a tile has all of its rows",
    "min(expert_offsets[expert + 1] - row, tile_rows), column_tile};",
    "tile_rows, column_tile};",
)

fault = faults("csrc/cuda/kernels/epilogues.cuh", TILE, into=KERNEL_FAULTS)
fault("the gate's bias is lost", "g[j] += gate[j];", "g[j] = gate[j];")
fault("up's bias is lost", "if (gated) u[j] += up[j];", "if (gated) u[j] = up[j];")
fault(
    "every expert has the first one's bias",
    "static_cast<const T*>(e.bias) + expert * width;",
    "static_cast<const T*>(e.bias);",
)
fault(
    "dS is taken after the weight",
    "if (j < count) score += da[j] * a[j];",
    "if (j < count) score += w * da[j] * a[j];",
)
fault(
    "dH without the routing weight",
    "const C upstream = w * da[j];",
    "const C upstream = da[j];",
)
fault("w A without the routing weight", "a[j] *= w;", "a[j] *= C(1);")
fault(
    "a gate above its limit has a gradient",
    "g > limit ? C(0) : f.slope * factor",
    "f.slope * factor",
    "tests/test_grouped_ffn.py::TestNumbers::test_clamp_of_the_other_gates",
)
fault(
    "up below its limit has a gradient",
    "u > limit || u < -limit ? C(0) : f.value",
    "u > limit ? C(0) : f.value",
    "tests/test_grouped_ffn.py::TestNumbers::test_clamp_of_the_other_gates",
)

# ---- the experts: decoding, ordinary arithmetic, and what is beside the products ------

DECODE = "tests/test_ffn_kernels.py::TestDecode::"

fault = faults(
    "csrc/cuda/kernels/grouped_gemm_decode.cuh",
    DECODE + "test_tokens[False-4-dtype0]",
    into=KERNEL_FAULTS,
)
fault(
    "a warp's lanes leave out what other warps never took",
    "k += kWarpSize * kPack",
    "k += kThreads * kPack",
)
fault(
    "a pack past the end of a row",
    "const int count = g.k - k < kPack ? static_cast<int>(g.k - k) : kPack;",
    "const int count = kPack;",
    DECODE + "test_sizes",
)
fault(
    "the lanes of a sum are not added up",
    "value[1] += __shfl_xor_sync(kFullWarp, value[1], distance);",
    "",
)
fault(
    "lanes keep the half that they should give",
    "const bool upper = threadIdx.x & distance;",
    "const bool upper = !(threadIdx.x & distance);",
)
fault("gate and up exchanged", "(c % 2 ? e.at.up : e.at.gate)", "(c % 2 ? e.at.gate : e.at.up)")
fault(
    "a tile writes rows that it does not have",
    "|| r >= tile.rows) return;",
    ") return;",
    DECODE + "test_routings[duplicates-3]",
)
fault(
    "batches that must not matter do",
    " && !g.context.batch_invariant",
    "",
    DECODE + "test_when_not[batch_invariant]",
)

SIMT = "tests/test_moe_forward.py::TestNumbers::"
fault = faults(
    "csrc/cuda/kernels/grouped_gemm_simt.cuh",
    SIMT + "test_routings[None-sentinels-dtype1]",
    into=KERNEL_FAULTS,
)
fault(
    "rows are looked up after they are used",
    "row_of[thread] = g.a.index ? g.a.index[row] : row;\n  }\n  __syncthreads();",
    "row_of[thread] = g.a.index ? g.a.index[row] : row;\n  }",
)
fault(
    "a slice is read before it is there",
    "next_right.put(right_slice, right_along);\n    __syncthreads();",
    "next_right.put(right_slice, right_along);",
)
fault(
    "a slice is overwritten while it is read",
    "__syncthreads();  // the slices are read: the next ones may take their place",
    "",
    SIMT + "test_sizes[False-520-129-dtype1]",
)
fault(
    "gate and up exchanged",
    "const C gate[2] = {acc[i][0], acc[i][2]}, up[2] = {acc[i][1], acc[i][3]};",
    "const C up[2] = {acc[i][0], acc[i][2]}, gate[2] = {acc[i][1], acc[i][3]};",
)
fault(
    "a weight gradient goes on to the last row",
    "const int64_t end = g.context.expert_offsets[tile.expert + 1];",
    "const int64_t end = g.context.expert_offsets[g.context.experts];",
)

fault = faults(
    "csrc/cuda/kernels/grouped_ffn.cu",
    SIMT + "test_routings[None-sentinels-dtype1]",
    into=KERNEL_FAULTS,
)
fault(
    "a bias gradient's parts are read before they are there",
    "parts[lane][mine] = part;\n    __syncthreads();",
    "parts[lane][mine] = part;",
)
fault(
    "a bias gradient's parts are overwritten while they are read",
    "__syncthreads();  // the parts are read: the next ones may take their place",
    "",
    SIMT + "test_rows_an_expert[520-dtype0]",
)
fault(
    "a bias gradient is weighted by the token's number",
    "g.weights_dtype, g.row_assignment[r])",
    "g.weights_dtype, row)",
)
fault(
    "a dropped assignment's gradient is never written",
    "if (thread < g.assignments && g.assignment_row[thread] < 0) {",
    "if (false) {",
)
fault(
    "dS takes the bias of the row's neighbour",
    "if (lane == i) score += product;",
    "if (lane == (i ^ 1)) score += product;",
)
fault(
    "the first row of an expert belongs to the one before",
    "(context.expert_offsets[middle] <= row ? low : high) = middle;",
    "(context.expert_offsets[middle] < row ? low : high) = middle;",
)
fault(
    "the first row of the tail is not cleared",
    "tail.context.expert_offsets[tail.context.experts] * tail.columns;",
    "(tail.context.expert_offsets[tail.context.experts] + 1) * tail.columns;",
    "tests/test_grouped_ffn.py::TestNumbers::test_a_tail_is_never_read",
)
