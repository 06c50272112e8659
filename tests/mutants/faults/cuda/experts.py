"""The experts."""

from mutants.fault import collection

FAULTS, faults = collection()

# ---- the experts: tiles on tensor cores ------------------------------------------------------

TENSOR_CORES = "tests/test_ffn_kernels.py::TestTensorCores::"
TILE = TENSOR_CORES + "test_tiles[64-layout0]"
INTERLEAVED = TENSOR_CORES + "test_tiles[32-layout2]"
ODD = TENSOR_CORES + "test_activations[False-geglu]"
MANY_ORDERS = TENSOR_CORES + "test_same_bits[False-dtype0]"
BESIDE = TENSOR_CORES + "test_what_is_beside_an_operand_is_not_read[False-dtype0]"

fault = faults("csrc/cuda/kernels/grouped_gemm_sm80.cuh", TILE)
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
    TENSOR_CORES + "test_thousands_of_experts",
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
    "    __syncthreads();  // every copy has landed and",
    "    // every copy has landed and",
    MANY_ORDERS,
)
fault(
    "staged rows are read before all warps have written them",
    "      }\n    }\n    __syncthreads();\n  }\n};",
    "      }\n    }\n  }\n};",
)
fault(
    "the second 128 rows of a tile are staged over the first",
    "if (first) __syncthreads();",
    "",
    TENSOR_CORES + "test_tiles[256-layout0]",
)
fault(
    "a tile writes rows that it does not have",
    "out.finish(r, staged < rows, held, value, up);",
    "out.finish(tile.row + first + staged, true, held, value, up);",
)
fault(
    "gate and up exchanged, interleaved",
    "split(value, up, interleaved);",
    "split(up, value, interleaved);",
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
    "a row has the routing weight of the row before",
    "found = out.look_up(row_at(step + 2));",
    "found = out.look_up(row_at(step + 1));",
)
fault(
    "dS misses half of a tile's columns",
    "for (int d = kTileN / 16; d > 0",
    "for (int d = kTileN / 32; d > 0",
)
fault(
    "a weight's tile writes rows that the weight does not have",
    "value, value, staged < staged_rows);",
    "value, value, true);",
    TENSOR_CORES + "test_weight_gradients_of_256_rows[layout0]",
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

fault = faults("csrc/cuda/kernels/grouped_gemm_sm80.cu")
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

fault = faults("csrc/cuda/kernels/operand_tiles.cuh", TILE)
fault(
    "k's tail is a chunk too long",
    "chunks_left_ = k_bytes / 16 - chunk;",
    "chunks_left_ = k_bytes / 16 - chunk + 1;",
    BESIDE,
)
fault(
    "threads for which a tile has no row copy one",
    "    if (kIdle && target_ < 0) return;\n",
    "",
    TENSOR_CORES + "test_tiles[16-layout0]",
)
fault(
    "a weight gradient takes rows of the next expert",
    "k < rows_ && from >= 0 ? 16 : 0);",
    "16);",
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

fault = faults("csrc/cuda/kernels/tiles.cuh", TILE)
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
    "min(end_row - row, tile_rows), column_tile};",
    "tile_rows, column_tile};",
)

fault = faults("csrc/cuda/kernels/epilogues.cuh", TILE)
fault("the gate's bias is lost", "g[j] = gate_bias_[j] + gate[j];", "g[j] = gate[j];")
fault("up's bias is lost", "u[j] = up_bias_[j] + up[j];", "u[j] = up[j];")
fault(
    "every expert has the first one's bias",
    "bias.values(bias.load(expert), gate_bias_, up_bias_);",
    "bias.values(bias.load(0), gate_bias_, up_bias_);",
)
fault(
    "threads past the last column store over others' columns",
    "count_ = left > N ? N : left > 0 ? static_cast<int>(left) : 0;",
    "count_ = left < N && left > 0 ? static_cast<int>(left) : N;",
)
fault(
    "interleaved gates and ups are kept side by side",
    "if constexpr (kGated) join(gate, up, interleaved_);",
    "",
    INTERLEAVED,
)
fault(
    "dS is taken after the weight",
    "score += da[j] * a[j];",
    "score += w * da[j] * a[j];",
)
fault(
    "dH without the routing weight",
    "const C upstream = w * da[j];",
    "const C upstream = da[j];",
)
fault("w A without the routing weight", "a[j] *= w;", "a[j] *= C(1);")
fault(
    "a 16-bit routing weight is taken for a float32 one",
    "return !e.weights || e.weights_dtype == Dtype::f32 ?",
    "return true ?",
    TENSOR_CORES + "test_routing_weights_of_16_bits",
)

fault = faults("csrc/cuda/kernels/activations.cuh", TILE)
fault("e^x of 16-bit results is 2^x", "x * 1.44269504088896340736f", "x", TILE)
fault(
    "a gate above its limit has a gradient",
    "g[j] > limit_ ? C(0) : f[j].slope * factor",
    "f[j].slope * factor",
    "tests/test_grouped_ffn.py::TestNumbers::test_clamp_of_the_other_gates",
)
fault(
    "up below its limit has a gradient",
    "u[j] > limit_ || u[j] < -limit_ ? C(0) : f[j].value",
    "u[j] > limit_ ? C(0) : f[j].value",
    "tests/test_grouped_ffn.py::TestNumbers::test_clamp_of_the_other_gates",
)

# ---- the experts: decoding, ordinary arithmetic, and what is beside the products -------------

DECODE = "tests/test_ffn_kernels.py::TestDecode::"

fault = faults(
    "csrc/cuda/kernels/grouped_gemm_decode.cuh",
    DECODE + "test_tokens[False-4-dtype0]",
)
fault(
    "a warp's lanes leave out what other warps never took",
    "; k += kWarpSize * kPack",
    "; k += kThreads * kPack",
)
fault(
    "a pack past the end of a row",
    "return kWhole || g.full.k - k >= kPack ? kPack : static_cast<int>(g.full.k - k);",
    "return kPack;",
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
    "of a block's tiles every other one is left out",
    "block += gridDim.x",
    "block += 2 * gridDim.x",
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
)
fault(
    "rows are looked up after they are used",
    "leads(from, p.a.limit) ? from : -1;\n    }\n    __syncthreads();",
    "leads(from, p.a.limit) ? from : -1;\n    }",
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
    "first[j] = acc[0][Kind::kPaired ? 2 * j : j];\n        second[j] =",
    "second[j] = acc[0][Kind::kPaired ? 2 * j : j];\n        first[j] =",
)
fault(
    "a weight gradient goes on to the last row",
    "begin + rows_of(g.context.expert_offsets, tile.expert, g.context.rows);",
    "offset_of(g.context.expert_offsets, g.context.experts, g.context.rows);",
)

fault = faults(
    "csrc/cuda/kernels/grouped_ffn.cu",
    SIMT + "test_routings[None-sentinels-dtype1]",
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
    "part += weight_of<C>(g, assignment_of(g, r)) * value;",
    "part += weight_of<C>(g, assignment_of(g, row)) * value;",
)
fault(
    "a dropped assignment's gradient is never written",
    "if (!has_row) store_as<C>(g.out, g.out_dtype, thread, C(0));",
    "",
)
fault(
    "dS takes the bias of the row's neighbour",
    "if (lane == i) score += product;",
    "if (lane == (i ^ 1)) score += product;",
)
fault(
    "the first row of an expert belongs to the one before",
    "(offset_of(context.expert_offsets, middle, context.rows) <= row ? low : high) = middle;",
    "(offset_of(context.expert_offsets, middle, context.rows) < row ? low : high) = middle;",
)
fault(
    "the first row of the tail is not cleared",
    "offset_of(context.expert_offsets, context.experts, context.rows) * tail.columns;",
    "(offset_of(context.expert_offsets, context.experts, context.rows) + 1) * tail.columns;",
    "tests/test_grouped_ffn.py::TestNumbers::test_a_tail_is_never_read",
)

# ---- plans that do not fit --------------------------------------------------------------------

PLANS = "tests/test_plans_that_do_not_fit.py::"
NO_TOKEN = PLANS + "test_rows_of_no_token_count_nothing"

fault = faults("csrc/cuda/kernels/tiles.cuh", PLANS)
fault(
    "an offset past the rows is followed",
    "return min(max(expert_offsets[e], 0), static_cast<int>(rows));",
    "return max(expert_offsets[e], 0);",
    PLANS + "test_offsets_past_the_rows_are_the_first_or_the_last",
)
fault(
    "an expert whose offsets fall has fewer rows than none",
    "return max(offset_of(expert_offsets, e + 1, rows) - offset_of(expert_offsets, e, rows), 0);",
    "return offset_of(expert_offsets, e + 1, rows) - offset_of(expert_offsets, e, rows);",
    PLANS + "test_offsets_that_fall_take_no_rows_from_others",
)
fault(
    "an index below 0 leads somewhere",
    "return index >= 0 && index < limit;",
    "return index < limit;",
    NO_TOKEN,
)
fault = faults("csrc/cuda/kernels/grouped_gemm_sm80.cuh", NO_TOKEN)
fault(
    "rows of no token are copied into a tile",
    "if (p.a.index && !leads(from, p.a.limit)) return nullptr;",
    "",
)
fault = faults("csrc/cuda/kernels/operand_tiles.cuh", NO_TOKEN)
fault(
    "a weight's gradient follows every token",
    "if (index_ && static_cast<unsigned>(next_[i]) >= limit_) next_[i] = -1;",
    "",
)
fault = faults(
    "csrc/cuda/kernels/epilogues.cuh", PLANS + "test_rows_of_no_assignment_have_no_gradient"
)
fault(
    "a row of no assignment has a weight",
    "return assignment >= 0 && assignment < e.assignments;",
    "return true;",
)

# ---- LoRA beside the matrices ----------------------------------------------------------------

LOW_RANK = "tests/test_moe_forward.py::TestLowRank::"

fault = faults("csrc/cuda/kernels/grouped_gemm_sm80.cuh", LOW_RANK + "test_layouts")
fault("the factors add nothing, on tensor cores", "part < 2; ++part", "part < 1; ++part")
fault = faults("csrc/cuda/kernels/grouped_gemm_simt.cuh", LOW_RANK + "test_layouts")
fault("the factors add nothing", "part < 2; ++part", "part < 1; ++part")
fault = faults("csrc/cuda/kernels/grouped_gemm_decode.cuh", LOW_RANK + "test_few_tokens")
fault(
    "of a rank the terms past a warp's lanes are left out",
    "k < g.low_rank.k; k += kWarpSize",
    "k < g.low_rank.k; k += g.low_rank.k",
)
fault = faults("csrc/cuda/kernels/grouped_gemm_sm80.cu", LOW_RANK + "test_ranks")
fault(
    "tensor cores take factors that 16-byte copies cannot read",
    "(gemm.low_rank.k == 0 || takes(gemm.low_rank))",
    "true",
)
fault = faults("csrc/cuda/ffn.cpp", LOW_RANK + "test_layouts")
fault("backward: dx misses the factors", "call.up_proj, dh_b, up_a,", "call.up_proj, {}, up_a,")
fault(
    "backward: B's gradient takes the rows of A's",
    "second_gradient(kDownLoraB, call.down_lora_a, call.down_lora_b, rows_of(wa), dy)",
    "weight_gradient(kDownLoraB, call.down_lora_b, rows_of(dy_b), dy)",
)
