"""The experts on Hopper."""

from mutants.fault import CHECKED, collection

FAULTS, faults = collection()

HOPPER = "tests/test_ffn_kernels_sm90.py::TestHopper::"
LAYOUT = HOPPER + "test_layouts[layout0-dtype0]"
INTERLEAVED = HOPPER + "test_layouts[layout2-dtype0]"
TURNS = HOPPER + "test_several_turns[layout0]"
SIZES = HOPPER + "test_sizes"
NAN = HOPPER + "test_another_experts_nan_stays_its_own"
ROUTINGS = HOPPER + "test_routings"
NO_ROWS = HOPPER + "test_experts_without_rows_have_no_gradient[False]"
BESIDE = HOPPER + "test_what_is_beside_an_operand_is_not_read[False]"
SAME_BITS = HOPPER + "test_same_bits[layout0]"
CLAMPS = HOPPER + "test_clamps[layout0]"
NO_MAPS = HOPPER + "test_a_driver_that_makes_no_maps"

# ---- stages and their barriers ---------------------------------------------------------------

fault = faults("csrc/cuda/kernels/sm90_pipeline.cuh", TURNS)
fault(
    "the producer does not wait for an empty stage",
    "ptx::mbarrier_wait(ptx::smem_u32(&empty[ring.stage()]), ring.parity() ^ 1);",
    "",
)
fault(
    "the wrong parity at an empty stage",
    "(&empty[ring.stage()]), ring.parity() ^ 1);",
    "(&empty[ring.stage()]), ring.parity());",
)
fault(
    "the wrong parity at a full stage",
    "ptx::mbarrier_wait(full_at(ring), ring.parity());",
    "ptx::mbarrier_wait(full_at(ring), ring.parity() ^ 1);",
)
fault("the parity does not change", "    parity_ ^= 1;\n", "")
fault(
    "the stages are one too few",
    "if (++stage_ < kStages) return;",
    "if (++stage_ < kStages - 1) return;",
    SAME_BITS,
    CHECKED,
)
fault(
    "a consumer warpgroup, not each of its warps, empties a stage",
    "kConsumers * kWarpgroup / kWarpSize);",
    "kConsumers);",
)
fault(
    "one more arrival at an empty stage",
    "kConsumers * kWarpgroup / kWarpSize);",
    "kConsumers * kWarpgroup / kWarpSize + 1);",
)
fault("the barriers' making is not fenced", "    ptx::fence_mbarrier_init();\n", "")
fault(
    "every lane releases a stage",
    "if (ptx::elect_one()) ptx::mbarrier_arrive(ptx::smem_u32(&empty[stage]));",
    "ptx::mbarrier_arrive(ptx::smem_u32(&empty[stage]));",
)
fault(
    "a stage is released while its products are under way",
    "    if (before >= 0) barriers.release(before);\n    before = ring.stage();",
    "    barriers.release(ring.stage());\n    before = -1;",
    LAYOUT,
    CHECKED,
)
fault(
    "two stages' products may be under way, and the older is released",
    "ptx::wgmma_wait<1>();",
    "ptx::wgmma_wait<2>();",
    LAYOUT,
    CHECKED,
)
fault(
    "the last stage of a tile is not released",
    "  if (before >= 0) barriers.release(before);\n}",
    "}",
)
fault("no wgmma.fence", "    ptx::wgmma_fence();\n", "")
fault("no group of products", "    ptx::wgmma_commit();\n", "")
fault("accumulators are read before the last products are done", "ptx::wgmma_wait<0>();", "")
fault(
    "accumulators go on from tile to tile",
    "  for (float& element : acc) element = 0.0f;\n",
    "  for (float& element : acc) element += 0.0f;\n",
)
fault(
    "products of the first tile of k only",
    "ptx::advance(b, step * kStepB), true);",
    "ptx::advance(b, step * kStepB), step > 0);",
)
fault(
    "K-major, the next 16 of k are 64 bytes on",
    "constexpr int kStepA = kMnA ? 16 * kRowBytes : 32;",
    "constexpr int kStepA = kMnA ? 16 * kRowBytes : 64;",
)
fault(
    "MN-major, the next 16 of k are 8 rows on",
    "constexpr int kStepB = kMnB ? 16 * kRowBytes : 32;",
    "constexpr int kStepB = kMnB ? 8 * kRowBytes : 32;",
)
fault(
    "the two strides of an MN-major operand are exchanged",
    "ptx::descriptor(ptx::smem_u32(stages->b), kEightRows, kPanelBytes)",
    "ptx::descriptor(ptx::smem_u32(stages->b), kPanelBytes, kEightRows)",
)
fault(
    "the second consumer reads the first one's rows",
    "(stages->a) + consumer * kPanelBytes, kEightRows)",
    "(stages->a) + consumer * 0, kEightRows)",
)
fault(
    "a block skips the expert after one without rows",
    "      first_ += tiles;\n",
    "      first_ += tiles;\n      if (rows == 0) ++expert_;\n",
    NO_ROWS,
)
fault(
    "experts have full tiles only",
    "(rows + kTileM - 1) / kTileM;\n      const int tiles",
    "rows / kTileM;\n      const int tiles",
)
fault(
    "a consumer without rows keeps the stages",
    "    barriers.wait_full(ring);\n    barriers.release(ring.stage());\n",
    "    barriers.wait_full(ring);\n",
)

# ---- the way in --------------------------------------------------------------------------------

fault = faults("csrc/cuda/kernels/sm90_producers.cuh", LAYOUT)
fault(
    "a stage of boxes expects too few bytes",
    "ptx::mbarrier_arrive_expect(full, sizeof(Stage<T>));",
    "ptx::mbarrier_arrive_expect(full, sizeof stage.b);",
)
fault(
    "a gathered stage expects the gathered rows too",
    "ptx::mbarrier_arrive_expect(full, sizeof stage.b);\n          load_weight",
    "ptx::mbarrier_arrive_expect(full, sizeof stage);\n          load_weight",
)
fault(
    "gate and up are exchanged",
    "const int column = columns.box[half];",
    "const int column = columns.box[1 - half];",
)
fault(
    "the weight is another expert's",
    "columns, i * kTileK, tile.expert);\n      }\n    }\n  }\n}\n\n// Stages",
    "columns, i * kTileK, 0);\n      }\n    }\n  }\n}\n\n// Stages",
)
fault(
    "MN-major, both halves of 128 columns are the first",
    "{column + kTileK, k, expert}",
    "{column, k, expert}",
)
fault("cp.async is not fenced for wgmma", "    ptx::fence_proxy_async();\n", "", LAYOUT, CHECKED)
fault(
    "a lane tells of copies that others of its warp are still to see landed",
    "    __syncwarp();\n    if (ptx::elect_one()) ptx::mbarrier_arrive(barriers_",
    "    if (ptx::elect_one()) ptx::mbarrier_arrive(barriers_",
    LAYOUT,
    CHECKED,
)
fault(
    "a stage is told of before its copies have landed",
    "ptx::cp_async_wait<kLag>();",
    "ptx::cp_async_wait<kLag + 1>();",
    LAYOUT,
    "--emulator-seeds=4",
)
fault("the last stages' copies are not waited for", "    ptx::cp_async_wait<0>();\n", "")
fault(
    "the stages under way at the end are not told of",
    "    while (under_way_ > 0) tell_of_one();\n",
    "",
)
fault(
    "rows that a tile lacks are gathered",
    "if (row >= tile.rows) return nullptr;",
    "if (false) return nullptr;",
    ROUTINGS,
    CHECKED,
)
fault(
    "indices of another tile",
    "p.a.index[tile.row + row] : tile.row + row;",
    "p.a.index[tile.row + row] : row;",
    "tests/test_ffn_kernels_sm90.py::TestHopperWithoutWeights",
)
fault(
    "k of a gradient goes past the expert's rows on one side",
    "begin, rows, k).at);",
    "begin, rows + kTileK, k).at);",
    NAN,
)
fault(
    "a gradient's columns come from the expert before",
    "(a.index ? 0 : begin * row_bytes)",
    "(a.index ? 0 : 0 * row_bytes)",
    "tests/test_ffn_kernels_sm90.py::TestHopperWithoutWeights",
)
fault(
    "a gradient's rows are numbered from the first expert's",
    "a.index ? a.index + begin : nullptr",
    "a.index ? a.index : nullptr",
)
fault(
    "columns past a gradient's end are read",
    "return first + chunk * 8 < a_columns ?",
    "return true ?",
    BESIDE,
    SIZES,
)
fault(
    "a gradient's second panel is the first",
    "const int64_t first = tile.row + which * kTileK;",
    "const int64_t first = tile.row;",
)

# ---- the way out -------------------------------------------------------------------------------

fault = faults("csrc/cuda/kernels/sm90_store.cuh", LAYOUT)
fault("stores are not fenced for TMA", "    ptx::fence_proxy_async();\n", "", LAYOUT, CHECKED)
fault(
    "a slice is sent before all have laid their part",
    "    ptx::fence_proxy_async();\n    consumer_.sync();\n",
    "    ptx::fence_proxy_async();\n",
    SAME_BITS,
    "--emulator-seeds=4",
)
fault(
    "a slice is laid where TMA still reads",
    "if (consumer_.leads()) ptx::tma_store_wait_read<1>();",
    "if (consumer_.leads()) ptx::tma_store_wait_read<2>();",
    TURNS,
    CHECKED,
)
fault(
    "a slice is laid before the leader has waited",
    "two slices ago\n    consumer_.sync();",
    "two slices ago",
    TURNS,
    CHECKED,
)
fault("the block ends before TMA has read", "if (leads_) ptx::tma_store_wait<0>();", "")
fault(
    "rows go out as if the tile were full",
    "return {{column, kRaggedRows - count + i, begin + count, kRaggedRows}};",
    "return {{column, kRaggedRows - 128 + i, begin + 128, kRaggedRows}};",
)
fault(
    "a row further on",
    "return {{column, kRaggedRows - count + i, begin + count, kRaggedRows}};",
    "return {{column, kRaggedRows - count + i, begin + count + 1, kRaggedRows}};",
)
fault("gate's half for up's", "{rows.at[0], half, rows.at[1]", "{rows.at[0], 0, rows.at[1]")
fault(
    "a transposed store without its transposition",
    "if constexpr (kTransposed) {",
    "if constexpr (false) {",
)
fault(
    "one buffer for every slice",
    "    next_ ^= 1;\n",
    "",
    TURNS,
    CHECKED,
)

# ---- epilogues ---------------------------------------------------------------------------------

fault = faults("csrc/cuda/kernels/sm90_epilogues.cuh", LAYOUT)
fault(
    "up's bias is gate's",
    "static_cast<int>(e.columns) + column + i * 2);",
    "column + i * 2);",
)
fault(
    "another expert's bias",
    "static_cast<const T*>(e.bias) + expert * width",
    "static_cast<const T*>(e.bias) + 0 * expert * width",
)
fault(
    "an interleaved tile takes as many columns of the output as of the weight",
    "return {first, {2 * first, 2 * first + kTileN / 2}};",
    "return {first, {first, first + kTileN / 2}};",
    HOPPER + "test_several_turns[layout2]",
)
fault(
    "interleaved activations go to the row below",
    "row + j % 2 * 8, i + j / 2 * 4 + lane % 4",
    "row + (1 - j % 2) * 8, i + j / 2 * 4 + lane % 4",
    INTERLEAVED,
)
fault(
    "preactivations are kept without their bias",
    "bias.add(eight, acc + slice * (kSlice / 2) + i, column + i * 2);\n      };",
    "bias.add(eight, acc + slice * (kSlice / 2) + i, 0);\n      };",
)

fault = faults("csrc/cuda/kernels/sm90_backward.cuh", LAYOUT)
fault(
    "preactivations are read before they have landed",
    "      ptx::mbarrier_wait(ptx::smem_u32(&landed_.barrier[set]), parity_ >> set & 1);\n",
    "",
    LAYOUT,
    CHECKED,
)
fault("the parity of preactivations does not change", "      parity_ ^= 1u << set;\n", "", TURNS)
fault(
    "the next preactivations come where gradients still leave from",
    "          ptx::tma_store_wait_read<0>();  // of the slice before",
    "          // of the slice before",
    HOPPER + "test_sizes[False-72-520]",
    CHECKED,
)
fault(
    "a tile's first preactivations come where the last tile's gradients still leave from",
    "    ptx::tma_store_wait_read<0>();  // of the tile before\n",
    "",
    TURNS,
    CHECKED,
)
fault(
    "gradients are not fenced for TMA",
    "      ptx::fence_proxy_async();\n",
    "",
    LAYOUT,
    CHECKED,
)
fault(
    "gradients are sent before all have laid theirs",
    "      ptx::fence_proxy_async();\n      consumer_.sync();\n",
    "      ptx::fence_proxy_async();\n",
    LAYOUT,
    CHECKED,
)
fault(
    "the weight of the row below",
    "const float w = weight[j / 2 % 2]",
    "const float w = weight[1 - j / 2 % 2]",
)
fault("w A without w", "u[j] *= upstream, a[j] *= w;", "u[j] *= upstream;")
fault(
    "a row's part of the weights' gradient lacks half of its lanes",
    "for (int d = 1; d < 4; d *= 2) {",
    "for (int d = 1; d < 2; d *= 2) {",
)
fault(
    "a row's part of the weights' gradient is of the last slice",
    "score[j / 2 % 2] += da[i + j] * a[j];",
    "score[j / 2 % 2] = da[i + j] * a[j];",
)
fault(
    "rows that a tile lacks have parts of the weights' gradient",
    "if (lane % 4 == 0 && at < tile.rows) {",
    "if (lane % 4 == 0) {",
    ROUTINGS,
    CHECKED,
)

# ---- blocks ------------------------------------------------------------------------------------

fault = faults("csrc/cuda/kernels/grouped_gemm_sm90.cuh", LAYOUT)
fault(
    "roles begin before the barriers are made",
    "smem.barriers.init(full_arrivals);\n  __syncthreads();",
    "smem.barriers.init(full_arrivals);",
    LAYOUT,
    "--emulator-seeds=4",
)
fault(
    "the producer keeps its registers",
    "      ptx::give_registers<kProducerRegisters<V::kGathered>>();\n",
    "",
)
fault(
    "a consumer with a few rows is taken for one without",
    "    if (number * kConsumerM >= tile.rows) {\n      skip(smem.barriers, ring, depth);\n"
    "      continue;\n    }\n    if constexpr",
    "    if (number * kConsumerM + 63 >= tile.rows) {\n      skip(smem.barriers, ring, depth);\n"
    "      continue;\n    }\n    if constexpr",
)
fault(
    "an expert without rows leaves its gradient as it was",
    "    multiply(acc, products, smem.barriers, ring, depth);  // zeros",
    "    if (depth == 0) continue;\n    multiply(acc, products, smem.barriers, ring, depth);  //",
    NO_ROWS,
)
fault(
    "the low-rank part's k is not counted",
    "const int depth = depth_of(gemm.full) + depth_of(gemm.low_rank);",
    "const int depth = depth_of(gemm.full);",
    "tests/test_ffn_kernels_sm90.py::TestHopperLoRA",
)

fault = faults("csrc/cuda/kernels/grouped_gemm_sm90.cu", LAYOUT)
fault(
    "preactivations go out in boxes of whole rows",
    "if (e.activation.gated && !e.activation.interleaved)",
    "if (false)",
    SIZES,
)
fault(
    "few rows decide the kernel under batch_invariant",
    "(context.batch_invariant || context.rows > 64 * context.experts)",
    "context.rows > 64 * context.experts",
    HOPPER + "test_a_token_does_not_know_how_many_there_are",
)
fault(
    "more experts than offsets have room for",
    "context.experts <= kMostExperts &&",
    "context.experts <= 1024 &&",
    HOPPER + "test_more_experts_than_offsets_have_room_for",
)
fault(
    "the last column tile is left out",
    "return (gemm.epilogue.columns + tile - 1) / tile;",
    "return gemm.epilogue.columns / tile + (gemm.epilogue.columns < tile);",
    TURNS,
)
fault("maps that the driver refused are used", "maps_of(gemm).has_value()", "true", NO_MAPS)
fault("every GPU is told to lack maps", "if (!kBuilt || sm != 90)", "if (!kBuilt)", NO_MAPS)
