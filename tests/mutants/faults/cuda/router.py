"""Logits, scores, choices, and their statistics."""

from mutants.fault import CHECKED, collection

FAULTS, faults = collection()

# ---- router_logits ---------------------------------------------------------------------------

LOGITS = "tests/test_router_logits.py::"

fault = faults("csrc/cuda/kernels/router_logits.cu")
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
    "rows_left_ <= 0 || depth_left_ <= 0",
    "depth_left_ <= 0",
    LOGITS + "test_tiles",
)
fault(
    "where rows are no whole packs, elements past the end of K are read",
    "min(kAlongDepth ? depth_left_ : rows_left_, 4);",
    "4;",
    LOGITS + "test_hidden_sizes",
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

fault(
    "of an infinite gradient NaN is left",
    "rest - rest == 0 ? rest : 0.0f",
    "rest",
    LOGITS + "test_infinite_gradients",
)
fault(
    "with a rest of the gradient, K is cut as without",
    "tiles < kBlocks / 4 && !p.a_rest)",
    "tiles < kBlocks / 4)",
    LOGITS + "test_a_token_does_not_depend_on_how_a_sum_is_cut",
)

fault = faults("csrc/cuda/kernels/router_product_sm80.cu")
fault(
    "what rounding left of the gradient is lost",
    "(p.a_rest ? 2 : 1)",
    "1",
    LOGITS + "test_gradients_keep_their_digits",
)
fault(
    "a slab counts again in the next",
    "      Loop::clear(sum);\n    });",
    "    });",
    LOGITS + "test_hidden_sizes",
)
fault(
    "the last slab is not added where it is a part of one",
    "if (tile + 1 < depth && (tile + 1) % kSlabTiles != 0) return;",
    "if ((tile + 1) % kSlabTiles != 0) return;",
    LOGITS + "test_hidden_sizes",
)
fault(
    "slabs are of another length",
    "(tile + 1) % kSlabTiles != 0",
    "(tile + 1) % (2 * kSlabTiles) != 0",
    LOGITS + "test_a_token_does_not_depend_on_how_a_sum_is_cut",
)
fault(
    "rows past the last are read",
    "return first + row < extent ?",
    "return true ?",
    LOGITS + "test_tensor_tiles",
)
fault(
    "columns past the last are read",
    "return first + chunk * kChunk < extent ?",
    "return true ?",
    LOGITS + "test_tensor_tiles",
    CHECKED,
)
fault(
    "the last experts have no part in dx where they are no whole chunk",
    "(length + kChunk - 1) / kChunk * 16",
    "length / kChunk * 16",
    LOGITS + "test_tiles",
)
fault(
    "every part of a sum has the bias",
    "if (p.bias && p.splits == 1) {",
    "if (p.bias) {",
    LOGITS + "test_hidden_sizes",
)
fault(
    "columns past the last are written",
    "int64_t{0}), int64_t{8}));",
    "int64_t{8}), int64_t{8}));",
    LOGITS + "test_tiles",
)
fault(
    "parts of a sum are written one over the other",
    "static_cast<float*>(p.parts) + split * p.m * p.n",
    "static_cast<float*>(p.parts)",
    LOGITS + "test_hidden_sizes",
)

fault = faults("csrc/cuda/router_logits.cpp")
fault(
    "rows that 16-byte copies cannot read go to them",
    "(aligned || !tensor_cores)",
    "true",
    LOGITS + "test_non_contiguous",
)

# ---- topk_route ------------------------------------------------------------------------------

ROUTE = "tests/test_topk_route.py::"

fault = faults("csrc/cuda/kernels/topk_route.cu")
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
    "key_of(value[slot] + bias)",
    "key_of(value[slot])",
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
fault(
    "a lane counts in a long row's counts before they are cleared",
    "  __syncwarp();  // any lane may count any expert\n",
    "",
    ROUTE + "test_long_rows[dtype1-1100]",
    CHECKED,
)

fault = faults("csrc/cuda/kernels/route_grid.cuh")
fault(
    "the last block goes on past the last token",
    "end(begin + p.grid.tokens_per_block < p.tokens ?",
    "end(true ?",
    ROUTE + "test_token_blocks",
)
fault(
    "the blocks' long rows overlap",
    "blockIdx.x * kRows * p.grid.row_size",
    "blockIdx.x * p.grid.row_size",
    ROUTE + "test_long_rows[dtype1-1100]",
    CHECKED,
)

fault = faults("csrc/cuda/kernels/route_row.cuh")
fault(
    "slots past E hold zeros",
    "value[slot] = expert(slot) < num_experts ? four[j] : -kInfinity<Compute<T>>;",
    "value[slot] = four[j];",
    ROUTE + "test_sizes",
)
fault(
    "in a long row, an expert chosen twice has the last choice's gradient",
    "value[id / kWarpSize] += x;",
    "value[id / kWarpSize] = x;",
    ROUTE + "test_long_rows",
)

fault = faults("csrc/cuda/kernels/scores.cuh")
fault(
    "an id below 0 is the first expert",
    "return id < 0 ? num_experts :",
    "return id < 0 ? 0 :",
    ROUTE + "test_ids_below_zero",
)
fault(
    "a team's sum leaves out every other lane",
    "distance > 0; distance /= 2)\n    x += __shfl_xor_sync",
    "distance > 1; distance /= 2)\n    x += __shfl_xor_sync",
    ROUTE + "test_sizes",
)

fault = faults("csrc/cuda/kernels/topk_choice.cuh")
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

fault = faults("csrc/cuda/kernels/topk_route_backward.cu")
fault(
    "the normalisation counts as a constant",
    "const A d = g(j) - inner;",
    "const A d = g(j);",
    ROUTE + "test_each_gradient_alone",
)
fault(
    "score_sums' gradient misses the normalisation of sigmoid scores",
    "(gradient[slot] - mean) * row.inverse_score_sum",
    "gradient[slot] * row.inverse_score_sum",
    ROUTE + "test_each_gradient_alone",
)
fault(
    "the teams of a warp hear each other's choices",
    "__shfl_sync(kFullWarp, dmine, i, Team::kLanes)",
    "__shfl_sync(kFullWarp, dmine, i)",
    ROUTE + "test_each_gradient_alone",
)
fault(
    "padding gets a gradient",
    "p.dlogits, t, present, gradient)",
    "p.dlogits, t, true, gradient)",
    ROUTE + "test_padding",
)

# ---- accumulate_stats ------------------------------------------------------------------------

fault = faults("csrc/cuda/kernels/accumulate_stats.cu", "tests/test_accumulate_stats.py")
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
