"""The experts: grouped_ffn, and moe_forward."""

from mutants.fault import collection

FAULTS, faults = collection()

GROUPED, FORWARD, LOW_RANK = (
    "tests/test_grouped_ffn.py::TestNumbers::",
    "tests/test_moe_forward.py::TestNumbers::",
    "tests/test_moe_forward.py::TestLowRank::",
)
# For what only some of them run.
INSTRUCTION_SETS = "tests/test_instruction_sets.py"

fault = faults("csrc/cpu/grouped_ffn.cpp")
fault(
    "the tail of the rows is not cleared",
    "rows.narrow(0, call.kept, call.rows - call.kept).zero_();",
    "rows.narrow(0, call.kept, call.rows - call.kept).fill_(1);",
    GROUPED + "test_a_tail_is_never_read",
)

fault = faults("csrc/cpu/moe_forward.cpp")
fault(
    "backward: a row takes the weight of the assignment with its number",
    "w.const_data_ptr<T>()[assignment[r]];",
    "w.const_data_ptr<T>()[r];",
    FORWARD + "test_many_choices",
)
fault(
    "backward: the gradient of a dropped weight is not cleared",
    "at::zeros(w.sizes(), w.options())",
    "at::zeros(w.sizes(), w.options()).add_(1)",
    FORWARD + "test_gradient_of_dropped_weights_is_exactly_zero",
)

fault = faults("csrc/cpu/ffn.cpp")
fault(
    "an assignment's row past the last kept one passes",
    "ok &= row[a] < call.kept;",
    "ok &= row[a] < call.kept + 1000;",
    "tests/test_moe_forward.py::TestOperator::test_bad_tensors",
)

fault = faults("csrc/cpu/blocking.h")
fault(
    "an expert's rows are cut where the number of threads says",
    "count * at / pieces / kRowUnit * kRowUnit",
    "count * at / pieces",
    GROUPED + "test_same_bits",
)
fault(
    "the last row of an expert's second block is left out",
    "cut(i), cut(i + 1), places});",
    "cut(i), cut(i + 1) - (i > 0), places});",
    GROUPED + "test_rows_an_expert",
)

fault = faults("csrc/cpu/ffn_forward.cpp")
fault(
    "every expert adds the first one's bias",
    "bias.defined() ? data<T>(bias) + e * hidden + h0 : nullptr);",
    "bias.defined() ? data<T>(bias) + h0 : nullptr);",
    GROUPED + "test_many_experts",
)
fault(
    "interleaved: up reads the gate's rows",
    "call_.spec.interleaved ? 1 : intermediate",
    "call_.spec.interleaved ? 0 : intermediate",
    GROUPED + "test_layouts_and_clamps",
)
fault(
    "rows of one element: columns that alternate are taken from packed rows",
    "call.spec.interleaved && !along_k_ &&",
    "call.spec.interleaved &&",
    GROUPED + "test_rows_of_one_element",
)
fault(
    "the preactivations are kept before the bias",
    "bias.defined() ? data<T>(bias) + e * call_.width : nullptr,",
    "nullptr,",
    "tests/test_grouped_ffn.py::TestOperator::test_preactivations",
)
fault(
    "batch_invariant is forgotten",
    "along_k_ && !call_.batch_invariant",
    "along_k_",
    GROUPED + "test_batch_invariant",
)

fault = faults("csrc/cpu/ffn_backward.cpp")
fault(
    "backward: the weight's gradient misses the down bias",
    "              down_bias.defined()\n",
    "              down_bias.defined() && hidden < 0\n",
    FORWARD + "test_many_choices",
)
fault(
    "backward: the down bias takes its gradient without the weight",
    "bias_gradient(call_.hidden, upstream_, weight_)",
    "bias_gradient(call_.hidden, upstream_, nullptr)",
    FORWARD + "test_many_choices",
)
fault(
    "backward: a frozen expert's weight gradient is computed all the same",
    "if (call.wanted[g] && g != kWeights)",
    "if ((call.wanted[g] || g == kUpProj) && g != kWeights)",
    "tests/test_grouped_ffn.py::TestOperator::test_only_needed_gradients",
)
fault(
    "backward: the weight's gradient depends on the number of threads",
    "i += kActivateColumns) {",
    "i += kActivateColumns / at::get_num_threads()) {",
    FORWARD + "test_same_bits",
)

fault = faults("csrc/cpu/kernels/packing.inl")
fault(
    "micropanels: the second chunk of columns lies over the first",
    "(k0 * vectors + depth * first",
    "(k0 + depth * first",
    GROUPED + "test_sizes",
)
fault(
    "rows are packed without their last columns",
    "convert_in(part, row[i] + k * elements, filled);",
    "",
    GROUPED + "test_rows_an_expert",
)
fault(
    "packed rows add the first columns' bias to all",
    "v[i], bias ? bias + n : nullptr",
    "v[i], bias",
    GROUPED + "test_rows_an_expert",
)
fault(
    "of columns that alternate in memory, up takes gate's",
    "o[i] = from[2 * i + 1];",
    "o[i] = from[2 * i];",
    GROUPED + "test_layouts_and_clamps",
)

fault = faults("csrc/cpu/kernels/gemm.inl")
fault(
    "weights along k: a chunk of k forgets the ones before",
    "const bool adds = k0 > 0;",
    "const bool adds = false;",
    GROUPED + "test_few_tokens_of_long_rows",
)
fault(
    "weights along k: many rows are cut along k otherwise than few",
    "const int64_t deepest = packed ? KC",
    "const int64_t deepest = !few ? KC",
    GROUPED + "test_batch_invariant",
)
fault(
    "the rows that micropanels leave over are forgotten",
    "for_even_tiles(a.others.rows, tallest,",
    "for_even_tiles(packed ? 0 : a.others.rows, tallest,",
    GROUPED + "test_rows_an_expert",
)
fault(
    "weights across k: a chunk of k forgets the ones before",
    "{tile, c.ld, k0 > 0 ? tile : nullptr, c.ld, false}",
    "{tile, c.ld, nullptr, c.ld, false}",
    GROUPED + "test_sizes",
)
fault(
    "few rows, weights across k: a chunk of k forgets the ones before",
    "wide_tiles(c, k0 > 0,",
    "wide_tiles(c, false,",
    GROUPED + "test_few_tokens_of_long_rows",
    INSTRUCTION_SETS,
)
fault(
    "few rows, whole rows of weights across k: a chunk of k forgets the ones before",
    "long_tiles(c, k0 > 0,",
    "long_tiles(c, false,",
    GROUPED + "test_few_tokens_of_long_rows",
    INSTRUCTION_SETS,
)
fault(
    "few rows, whole rows of weights across k: the rows past the last four are forgotten",
    "for (int64_t i = 0; i < a.cols; i += at_once) {",
    "for (int64_t i = 0; i + at_once <= a.cols; i += at_once) {",
    GROUPED + "test_few_tokens_of_long_rows",
    INSTRUCTION_SETS,
)
fault(
    "few rows, weights across k: the columns past the last wide tile are forgotten",
    "take(std::integral_constant<int, 2>());",
    "n = c.cols;",
    GROUPED + "test_few_tokens",
    INSTRUCTION_SETS,
)
fault(
    "few rows, weights across k: all tiles take the first rows",
    "accumulate, a.data + row * a.ld,",
    "accumulate, a.data,",
    GROUPED + "test_few_tokens_of_long_rows",
    INSTRUCTION_SETS,
)

fault = faults("csrc/cpu/kernels/gemm_tn.inl")
fault(
    "a weight gradient keeps its last 256 rows alone",
    "const T* before = chunk > 0 ? sum : nullptr;",
    "const T* before = nullptr;",
    GROUPED + "test_rows_an_expert",
)
fault(
    "a weight gradient takes all its rows from the first chunk",
    "keeps_left ? left + r0 * ld_left : left;",
    "left;",
    GROUPED + "test_rows_an_expert",
)
fault(
    "a weight gradient of very many rows packs them once",
    "if (!in_place && (n0 == 0 || !keeps_left)) {",
    "if (!in_place && n0 == 0) {",
    GROUPED + "test_rows_an_expert",
)

fault = faults("csrc/cpu/kernels/microkernels.inl")
fault(
    "micropanels: a sum of k forgets the ones before",
    "    accumulate = true;\n",
    "",
    GROUPED + "test_sizes",
)
fault(
    "a tall tile takes the first half of the weights' rows alone",
    "first < kWeightRows; first += at_once",
    "first < at_once; first += at_once",
    GROUPED + "test_few_tokens",
)
fault(
    "a tall tile takes one row of weights for all",
    "sum[m][first + r] = multiply_add(x, weight[r], sum[m][first + r]);",
    "sum[m][first + r] = multiply_add(x, weight[0], sum[m][first + r]);",
    GROUPED + "test_few_tokens",
)

fault = faults("csrc/cpu/kernels/activation.inl")
fault(
    "silu' misses alpha",
    "s + g * s * (T(1) - s) * alpha}",
    "s + g * s * (T(1) - s)}",
    GROUPED + "test_layouts_and_clamps",
)
fault(
    "gelu_tanh' misses the 3 of the cube",
    "(T(1) + g * g * (3 * cubic))",
    "(T(1) + g * g * cubic)",
    GROUPED + "test_activations",
)
fault(
    "a gradient passes the clamped gate",
    "weighted * (x > limit ? zero : slope)",
    "weighted * slope",
    GROUPED + "test_layouts_and_clamps",
)
fault(
    "preactivations of packed rows all go to the first ones",
    "h.kept.from_row(r + j)",
    "h.kept.from_row(j)",
    GROUPED + "test_rows_an_expert",
)
fault(
    "preactivations of the rows not packed go to the first ones",
    "h.kept.from_row(a.packed + r)",
    "h.kept.from_row(r)",
    GROUPED + "test_rows_an_expert",
)
fault(
    "up is not clamped below",
    "  v = v < -limit ? -limit : v;\n  return",
    "  return",
    GROUPED + "test_layouts_and_clamps",
)
fault(
    "dS is taken with the weight",
    "inner += upstream * value;",
    "inner += weighted * value;",
    FORWARD + "test_weights_of_zero_have_a_gradient",
)
fault(
    "the weight is missing in down_proj's gradient",
    "store(scaled + i, value * w);",
    "store(scaled + i, value);",
    FORWARD + "test_many_choices",
)

fault = faults("csrc/cpu/ffn.cpp")
fault(
    "every token adds up the first one's rows",
    "rows.rows().with_index(row + t * top_k)",
    "rows.rows().with_index(row)",
    FORWARD + "test_routings",
)

fault = faults("csrc/cpu/kernels/sums.inl")
fault(
    "a bias gradient keeps its last 256 rows alone",
    "total[c] += sum[c];",
    "total[c] = sum[c];",
    GROUPED + "test_rows_an_expert",
)

# ---- LoRA beside the matrices ----------------------------------------------------------------

fault = faults("csrc/cpu/ffn_forward.cpp", LOW_RANK + "test_layouts")
fault("the factors add nothing", "    kernel_.add_block(c, more);\n", "")
fault(
    "up takes the gate's columns of B",
    "add(up, c0, up_begin);",
    "add(up, c0, 0);",
)
fault(
    "packed rows meet a B that lies across",
    "b_(packs || skips ? along_k(b) : b)",
    "b_(skips ? along_k(b) : b)",
    LOW_RANK + "test_ranks",
)
fault = faults("csrc/cpu/ffn.cpp")
fault(
    "packed rows meet a rank of 1 whose stride says nothing",
    "factor.size(k_dim) == 1 ? 1 : factor.stride(k_dim)",
    "factor.stride(k_dim)",
    LOW_RANK + "test_ranks",
)
fault = faults("csrc/cpu/ffn_backward.cpp", LOW_RANK + "test_layouts")
fault(
    "backward: the activations' gradient misses the factors",
    "if (down_low_rank) add(",
    "if (false) add(",
)
fault(
    "backward: x A stands for dh B^T",
    "sum_of_products(call_.up_lora_a, tokens(), dh_b_.rows())",
    "sum_of_products(call_.up_lora_a, tokens(), x_a_.rows())",
)
fault(
    "backward: a factor that does not fit into one product has its first columns alone",
    "n < rank; n += NC",
    "n < std::min(rank, NC); n += NC",
    LOW_RANK + "test_ranks",
)
