"""The planted faults: what a tired hand could write, over all stages, both directions."""

from typing import NamedTuple


class Fault(NamedTuple):
    name: str  # what is wrong
    file: str
    find: str  # occurs exactly once in the file
    replace: str
    tests: tuple[str, ...]  # pytest arguments; one of these tests must fail


def faults(file, *tests, into=None):
    """Collects the faults of one file: fault(name, find, replace, *tests)."""
    collected = FAULTS if into is None else into

    def fault(name, find, replace, *own):
        collected.append(Fault(name, file, find, replace, own or tests))

    return fault


FAULTS = []

# ---- the reference ------------------------------------------------------------

fault = faults("moe_ext/reference.py", "tests/test_reference.py")
fault(
    "a tie goes to the higher expert id",
    "by_score = choice.sort(dim=-1, descending=True, stable=True).indices",
    "by_score = choice.shape[-1] - 1 - choice.flip(-1).sort(dim=-1, descending=True, stable=True).indices",
)
fault(
    "a group is always scored by its best expert",
    'best[..., : 1 if group_score == "max" else 2]',
    "best[..., :1]",
)
fault(
    "drop order: choice and token exchanged",
    'if drop_policy == "token":',
    'if drop_policy == "choice":',
)
fault(
    "the clamp leaves up alone below",
    "up.clamp(-limit, limit)",
    "up.clamp(max=limit)",
)
fault(
    "statistics count padding",
    "score_sums = torch.where(present[:, None], distribution, 0.0).sum(0)",
    "score_sums = distribution.sum(0)",
)

# ---- router_logits ------------------------------------------------------------

fault = faults("csrc/cpu/router_logits.cpp", "tests/test_router_logits.py")
fault(
    "a slab of the hidden size forgets the ones before",
    "out[r * out_stride + c] += sum_of",
    "out[r * out_stride + c] = sum_of",
)
fault(
    "the second block of experts takes the first one's bias",
    "out[t * E + e] += bias[expert + e];",
    "out[t * E + e] += bias[e];",
)
fault(
    "what pads a row to whole vectors is not cleared",
    "for (int64_t c = columns; c < to_stride; ++c) to[c] = 0;",
    "for (int64_t c = columns; c < to_stride; ++c) to[c] = 1;",
)
fault(
    "float32 x beside another weight is read as if it were contiguous",
    "x.tensor.const_data_ptr<A>() + token * x.stride + begin",
    "x.tensor.const_data_ptr<A>() + token * H + begin",
)
fault(
    "backward: a slab forgets the ones before",
    "out[r * kColumns + c] += part[c];",
    "out[r * kColumns + c] = part[c];",
)
fault(
    "backward: every slab multiplies the first one's gradients",
    "a + row * a_row + k * a_depth, a_row",
    "a + row * a_row, a_row",
)
fault(
    "backward: the bias takes its gradient from the last token",
    "sum[e] += a[t * E + e];",
    "sum[e] = a[t * E + e];",
)

fault = faults("csrc/cpu/simd.h")
fault(
    "bfloat16 is truncated instead of rounded",
    "(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;",
    "bits >> 16;",
    "tests/test_weighted_combine.py",
)
fault(
    "an infinite float16 is read as 65536",
    "(bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;",
    "0u;",
    "tests/test_router_logits.py",
)
fault(
    "the exponential is off by 1e-5 below -1",
    "bit_cast<float>(bit_cast<uint32_t>(p * power) & keep);",
    "x < -1.0f ? 1.00001f * p * power : p * power;",
    "tests/test_topk_route.py",
)

# ---- topk_route ---------------------------------------------------------------

fault = faults("csrc/cpu/topk_route.cpp", "tests/test_topk_route.py")
fault(
    "a tie goes to the higher expert id",
    "candidate < id ? candidate : id;",
    "id == std::numeric_limits<int32_t>::max() || candidate > id ? candidate : id;",
)
fault(
    "a NaN logit ranks as a number of its bits",
    "bit_cast<Key>((x == x ? x : -kInf<A>)+A(0))",
    "bit_cast<Key>(x + A(0))",
)
fault(
    "the selection bias does not choose",
    "key[e] = key_of(scores[e] + b[e]);",
    "key[e] = key_of(scores[e] + 0 * b[e]);",
)
fault(
    "groups are scored without the selection bias",
    "scores[e] + (bias ? bias[e] : A(0));",
    "scores[e];",
)
fault(
    "a group's second best expert is its best one of the past",
    "} else if (score > second) {",
    "} else if (score > second && second == -kInf<A>) {",
)
fault(
    "routed_scaling_factor is left out",
    "weight[j] *= scale;",
    "weight[j] *= 1;",
)
fault(
    "padding has a log-sum-exp",
    "logsumexp[t] = 0;",
    "logsumexp[t] = 1;",
)
fault(
    "counts take sentinels for the last expert's",
    "if (ids[a] < E) ++count[ids[a]];",
    "++count[std::min<int64_t>(ids[a], E - 1)];",
)
fault(
    "backward: the normalisation counts as a constant",
    "(dchosen[j] - inner) / total : dchosen[j];",
    "dchosen[j] / total : dchosen[j];",
)
fault(
    "backward: sigmoid' is s",
    "ds[e] *= scores[e] * (1 - scores[e]);",
    "ds[e] *= scores[e];",
)
fault(
    "backward: softmax loses the mean",
    "ds[e] = scores[e] * (ds[e] - inner);",
    "ds[e] = scores[e] * ds[e];",
)
fault(
    "backward: routed_scaling_factor is left out",
    "dweights[t * K + j] * scale;",
    "dweights[t * K + j];",
)
fault(
    "backward: score_sums' gradient misses the normalisation of sigmoid scores",
    "(dscore_sums[e] - mean) * share;",
    "dscore_sums[e] * share;",
)
fault(
    "backward: padding gets the gradient of the log-sum-exp",
    "std::fill_n(out, E, T(0));",
    "std::fill_n(out, E, T(1));",
)

# ---- capacity_scatter ---------------------------------------------------------

fault = faults("csrc/cpu/capacity_scatter.cpp", "tests/test_capacity_scatter.py")
fault(
    "an expert takes one row more than its capacity",
    "expert == all.num_experts || places[expert]-- > 0",
    "expert == all.num_experts || places[expert]-- >= 0",
)
fault(
    "drop order: choice and token exchanged",
    "if (policy == kToken) {",
    "if (policy == kChoice) {",
)
fault(
    "by weight, a tie goes to the later assignment",
    "key(a) > key(b) : a < b;",
    "key(a) > key(b) : a > b;",
)
fault(
    "by weight, the smallest stay",
    "key(a) > key(b) : a < b;",
    "key(a) < key(b) : a < b;",
)
fault(
    "padding takes capacity",
    "if (padding[t]) std::fill_n",
    "if (padding[t] && top_k < 0) std::fill_n",
)
fault(
    "a second sequence finds the experts as the first one left them",
    "std::fill(places.begin(), places.end(), capacity);",
    "if (begin == 0) std::fill(places.begin(), places.end(), capacity);",
)
fault(
    "the tail of row_token is 0 instead of -1",
    "std::fill(token_of + offsets[num_experts], token_of + rows, -1);",
    "std::fill(token_of + offsets[num_experts], token_of + rows, 0);",
)
fault(
    "an id below 0 passes",
    "lowest >= 0, lowest,",
    "lowest >= -1, lowest,",
)

fault = faults("csrc/checks/capacity_scatter.h", "tests/test_capacity_scatter.py")
fault(
    "R ignores the number of sequences",
    "const int64_t buckets = num_experts * num_sequences;",
    "const int64_t buckets = num_experts;",
)

# ---- gather_rows ----------------------------------------------------------------

fault = faults("csrc/cpu/gather_rows.cpp", "tests/test_gather_rows.py")
fault(
    "the tail is not cleared",
    "std::memset(to + r * row_bytes, 0, row_bytes);",
    "std::memset(to + r * row_bytes, 1, row_bytes);",
)
fault(
    "a token past the last one is read",
    'check_memory_below("gather_rows", "row_token", plan, x.size(0));',
    "",
)
fault(
    "backward: a dropped assignment takes the first row's gradient",
    "if (row[j] < 0) continue;\n        const T* mine = rows + row[j] * hidden + begin;",
    "const T* mine = rows + (row[j] < 0 ? 0 : row[j]) * hidden + begin;",
)
fault(
    "backward: the sum is rounded after every row",
    "sum[i] += static_cast<A>(widen(mine[i]));",
    "sum[i] = static_cast<A>(widen(narrow<T>(sum[i] + static_cast<A>(widen(mine[i])))));",
)
fault(
    "backward: every block of the hidden size sums the first one",
    "rows + row[j] * hidden + begin;",
    "rows + row[j] * hidden;",
)

# ---- weighted_combine -----------------------------------------------------------

fault = faults("csrc/cpu/weighted_combine.cpp", "tests/test_weighted_combine.py")
fault(
    "a block of the hidden size is summed twice at its seam",
    "for (int64_t i = 0; i < n; ++i) y[begin + i] = narrow<T>(sum[i]);",
    "for (int64_t i = 0; i < n - (begin > 0); ++i) y[begin + i] = narrow<T>(sum[i]);",
)
fault(
    "the weight is left out of the sum",
    "const A w = weight[j];",
    "const A w = 1;",
)
fault(
    "backward: the rows' gradient without the weight",
    "drow[i] = narrow<T>(weight * static_cast<A>(widen(dy[i])));",
    "drow[i] = narrow<T>(static_cast<A>(widen(dy[i])));",
)
fault(
    "backward: the weights' gradient keeps its last block alone",
    "        total += sum;",
    "        total = sum;",
)
fault(
    "backward: every token's gradient is the first choice's token",
    "dy_data + assignment / top_k * hidden",
    "dy_data + assignment % top_k * hidden",
)
fault(
    "backward: the tail of the rows' gradient is not cleared",
    "if (drow) std::fill_n(drow, hidden, T(0));",
    "if (drow) std::fill_n(drow, hidden, T(1));",
)

# ---- statistics -----------------------------------------------------------------

fault = faults(
    "csrc/cpu/accumulate_stats.cpp",
    "tests/test_stats.py",
    "tests/test_accumulate_stats.py",
    "tests/test_checkpoint.py",
)
fault(
    "a recomputed forward counts again",
    "if (is_recomputation()) return;",
    "",
)
fault(
    "padding counts as tokens",
    "if (padding && padding[t]) continue;",
    "",
)
fault(
    "a token that kept one of two assignments counts as lost",
    "assigned > 0 && kept == 0",
    "assigned > kept",
)

fault = faults("moe_ext/stats.py", "tests/test_stats.py")
fault(
    "MaxVio is the load over the mean, without the minus 1",
    "* num_experts / assignments - 1 if assignments",
    "* num_experts / assignments if assignments",
)

# ---- losses ---------------------------------------------------------------------

fault = faults("moe_ext/losses.py", "tests/test_losses.py")
fault(
    "the balance loss is not divided by top_k",
    "/ (tokens * top_k)",
    "/ tokens",
)
fault(
    "the injected gradient ignores the loss scale",
    "per_token = scale.to(logsumexp) / tokens",
    "per_token = torch.ones_like(scale).to(logsumexp) / tokens",
)
fault(
    "the injected balance loss is not divided by top_k",
    "aux_coef * counts.shape[0] / ctx.top_k",
    "aux_coef * counts.shape[0]",
)
fault(
    "the injected z-loss has half its gradient",
    "per_token * (2 * z_coef)",
    "per_token * z_coef",
)
fault(
    "the z-loss counts padding",
    "torch.where(present, logsumexp, 0.0)",
    "logsumexp",
)

# ---- the layer ------------------------------------------------------------------

fault = faults("moe_ext/moe.py")
fault(
    "the shared experts answer to padding",
    "if padding_mask is not None:\n            shared = shared",
    "if padding_mask is None:\n            shared = shared",
    "tests/test_moe.py::test_padding_is_as_if_the_tokens_were_not_there",
)
fault(
    "a sequence's capacity comes from the whole batch",
    "tokens, num_sequences = shape[-2], math.prod(shape[:-2])",
    "tokens, num_sequences = math.prod(shape[:-1]), math.prod(shape[:-2])",
    "tests/test_moe.py::test_every_option_as_written_out",
)
fault(
    "losses are injected in eval too",
    "            self.training\n            and self.inject_losses",
    "            self.inject_losses",
    "tests/test_losses.py::test_nothing_is_injected_in_eval_or_without_gradients",
)

fault = faults("moe_ext/routing.py")
fault(
    "capacity is rounded down",
    "capacity = -(-(tokens * self.numerator) // self.denominator)",
    "capacity = tokens * self.numerator // self.denominator",
    "tests/test_moe.py::test_capacity",
)
fault(
    "loss-free balancing moves the bias towards the load",
    "torch.sign(n.mean() - n)",
    "torch.sign(n - n.mean())",
    "tests/test_stats.py::test_update_moves_the_bias_against_the_load",
)
fault(
    "the selection bias is not used",
    "selection_bias=self.e_score_correction_bias",
    "selection_bias=None",
    "tests/test_transformers.py::test_deepseek_v3_bias_changes_the_choice",
)

# ---- grouped_ffn and moe_forward --------------------------------------------------

GROUPED, FORWARD = (
    "tests/test_grouped_ffn.py::TestNumbers::",
    "tests/test_moe_forward.py::TestNumbers::",
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
    "an expert's rows are cut where the number of threads says",
    "count * at / pieces / kRowUnit * kRowUnit",
    "count * at / pieces",
    GROUPED + "test_same_bits",
)
fault(
    "an assignment's row past the last kept one passes",
    "ok &= row[a] < call.kept;",
    "ok &= row[a] < call.kept + 1000;",
    "tests/test_moe_forward.py::TestOperator::test_bad_tensors",
)
fault(
    "the last row of an expert's second block is left out",
    "cut(i), cut(i + 1), place});",
    "cut(i), cut(i + 1) - (i > 0), place});",
    GROUPED + "test_rows_an_expert",
)
fault(
    "every expert adds the first one's bias",
    "down_bias.defined() ? data<T>(down_bias) + e * hidden + h0 : nullptr);",
    "down_bias.defined() ? data<T>(down_bias) + h0 : nullptr);",
    GROUPED + "test_many_experts",
)
fault(
    "interleaved: up reads the gate's rows",
    "step == 2 ? 1 : intermediate",
    "step == 2 ? 0 : intermediate",
    GROUPED + "test_layouts_and_clamps",
)
fault(
    "backward: the weight's gradient misses the down bias",
    "                         down_bias.defined()\n",
    "                         down_bias.defined() && hidden < 0\n",
    FORWARD + "test_many_choices",
)
fault(
    "backward: the down bias takes its gradient without the weight",
    "bias_gradient<T>(call, hidden, upstream, weight)",
    "bias_gradient<T>(call, hidden, upstream, nullptr)",
    FORWARD + "test_many_choices",
)
fault(
    "backward: a frozen expert's weight gradient is computed all the same",
    "  if (want_up) {",
    "  {",
    "tests/test_grouped_ffn.py::TestOperator::test_only_needed_gradients",
)
fault(
    "backward: the weight's gradient depends on the number of threads",
    "s0 += kActivateColumns) {",
    "s0 += kActivateColumns / at::get_num_threads()) {",
    FORWARD + "test_same_bits",
)
fault(
    "the preactivations are kept before the bias",
    "up_bias.defined() ? data<T>(up_bias) + e * call.width : nullptr,",
    "nullptr,",
    "tests/test_grouped_ffn.py::TestOperator::test_preactivations",
)
fault(
    "batch_invariant is forgotten",
    "along && !call.batch_invariant",
    "along",
    GROUPED + "test_batch_invariant",
)

fault = faults("csrc/cpu/kernels/block.inl")
fault(
    "panels: the second chunk of columns lies over the first",
    "(k0 * vectors + depth * first",
    "(k0 + depth * first",
    GROUPED + "test_sizes",
)
fault(
    "rows are turned over without their last columns",
    "convert_in(part, from[i] + k, count);",
    "",
    GROUPED + "test_rows_an_expert",
)
fault(
    "turned rows add the first columns' bias to all",
    "v[i], bias ? bias + n : nullptr",
    "v[i], bias",
    GROUPED + "test_rows_an_expert",
)

fault = faults("csrc/cpu/kernels/gemm.inl")
fault(
    "weights along k: a chunk of k forgets the ones before",
    "const bool adds = k0 > 0;",
    "const bool adds = false;",
    GROUPED + "test_few_tokens_of_long_rows",
)
fault(
    "the rows that panels leave over are forgotten",
    "m - turned, w, k,",
    "turned > 0 ? 0 : m, w, k,",
    GROUPED + "test_rows_an_expert",
)
fault(
    "weights across k: a chunk of k forgets the ones before",
    "{tile, ldc, k0 > 0 ? tile : nullptr, ldc, false}",
    "{tile, ldc, nullptr, ldc, false}",
    GROUPED + "test_sizes",
)
fault(
    "few rows, weights across k: a chunk of k forgets the ones before",
    "wide_tiles(c, ldc, k0 > 0,",
    "wide_tiles(c, ldc, false,",
    GROUPED + "test_few_tokens_of_long_rows",
    INSTRUCTION_SETS,
)
fault(
    "few rows, whole rows of weights across k: a chunk of k forgets the ones before",
    "long_tiles(c, ldc, k0 > 0,",
    "long_tiles(c, ldc, false,",
    GROUPED + "test_few_tokens_of_long_rows",
    INSTRUCTION_SETS,
)
fault(
    "few rows, whole rows of weights across k: the rows past the last four are forgotten",
    "for (int64_t i = 0; i < k; i += at_once) {",
    "for (int64_t i = 0; i + at_once <= k; i += at_once) {",
    GROUPED + "test_few_tokens_of_long_rows",
    INSTRUCTION_SETS,
)
fault(
    "few rows, weights across k: the columns past the last wide tile are forgotten",
    "take(std::integral_constant<int, 2>());",
    "n = cols;",
    GROUPED + "test_few_tokens",
    INSTRUCTION_SETS,
)
fault(
    "few rows, weights across k: all tiles take the first rows",
    "a + row * lda, lda, w + n,",
    "a, lda, w + n,",
    GROUPED + "test_few_tokens_of_long_rows",
    INSTRUCTION_SETS,
)
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
    "if (n0 == 0 || !keeps_left) load_rows",
    "if (n0 == 0) load_rows",
    GROUPED + "test_rows_an_expert",
)

fault = faults("csrc/cpu/kernels/tiles.inl")
fault(
    "panels: a sum of k forgets the ones before",
    "    accumulate = true;\n",
    "",
    GROUPED + "test_sizes",
)
fault(
    "a tall tile takes the first half of the weights' rows alone",
    "first < kOctet; first += at_once",
    "first < at_once; first += at_once",
    GROUPED + "test_few_tokens",
)
fault(
    "a tall tile takes one row of weights for all",
    "sum[m][first + r] += x * weight[r];",
    "sum[m][first + r] += x * weight[0];",
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
    "preactivations of turned rows all go to the first ones",
    "(r + j) * stride * size_of(dtype)",
    "j * stride * size_of(dtype)",
    GROUPED + "test_rows_an_expert",
)
fault(
    "preactivations of the rows not turned over go to the first ones",
    "static_cast<char*>(kept) + turned * stride * size_of(dtype)",
    "static_cast<char*>(kept)",
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

fault = faults("csrc/cpu/kernels/rows.inl")
fault(
    "of columns that alternate in memory, up takes gate's",
    "o[i] = from[2 * i + 1];",
    "o[i] = from[2 * i];",
    GROUPED + "test_layouts_and_clamps",
)
fault(
    "a dropped assignment adds row 0",
    "if (index[j] < 0) continue;\n      const T* row = rows + index[j] * ld + c0;",
    "const T* row = rows + std::max(index[j], 0) * ld + c0;",
    FORWARD + "test_routings",
)
fault(
    "a bias gradient keeps its last 256 rows alone",
    "total[c] += sum[c];",
    "total[c] = sum[c];",
    GROUPED + "test_rows_an_expert",
)

# ---- autograd wiring ------------------------------------------------------------

fault = faults("csrc/autograd.cpp")
fault(
    "a checkpointed forward pass is recomputed without autograd",
    "const variable_list saved = ctx->get_saved_variables();",
    "const at::AutoDispatchBelowAutograd below;\n"
    "    const variable_list saved = ctx->get_saved_variables();",
    "tests/test_checkpoint.py::test_checkpointing_changes_nothing",
)
fault(
    "frozen experts cost their gradient",
    "mask.push_back(wanted(input))",
    "mask.push_back(kept->edges[input] >= 0)",
    "tests/test_grouped_ffn.py::TestOperator::test_only_needed_gradients",
)
fault(
    "the output is kept for the backward pass",
    "ctx->save_for_backward(std::move(saved));",
    "saved.push_back(outputs[0]);\n    ctx->save_for_backward(std::move(saved));",
    "tests/test_moe_forward.py::TestOperator::test_bytes_kept_for_backward",
)
fault(
    "a gradient goes to another input",
    "stack[r].toTensor()",
    "stack[r ^ 1].toTensor()",
    "tests/test_weighted_combine.py",
)
fault(
    "forward-mode AD gives a silent zero",
    "!tensor._fw_grad(/*level=*/0).defined()",
    "true",
    "tests/test_moe.py::test_unsupported_derivatives_raise",
)

# ---- checkpoints ----------------------------------------------------------------

fault = faults("moe_ext/pretrained.py", "tests/test_pretrained.py")
fault(
    "gate and up are exchanged, in both directions",
    '("gate", view[:, 0], "e i h"), ("up", view[:, 1], "e i h")',
    '("gate", view[:, 1], "e i h"), ("up", view[:, 0], "e i h")',
)
fault(
    "interleaved experts are read as halves",
    "both = both.transpose(1, 2) if interleaved else both",
    "both = tensor.unflatten(1, (2, -1))",
)
fault(
    "axes stay in our order",
    'view = view.permute([axes.split().index(axis) for axis in re.findall(r"\\w", theirs)])',
    "view = view.contiguous()",
)
fault(
    "a scale counts for every n-th element instead of a block",
    "blocks = [(n, size // n)",
    "blocks = [(size // n, n)",
)
fault("a float32 router is rounded", "if dtype is None:  # a router", "if False:  # a router")
fault("what is left over goes unnoticed", "    if rest:", "    if rest and not prefix:")
fault("the first of several layers is taken", "if len(found) == 1:", "if found:")

# ---- blocks of transformers ------------------------------------------------------

BLOCKS = "moe_ext/integrations/transformers/blocks"
BLOCK_TESTS = "tests/integrations/test_blocks.py"

fault = faults(f"{BLOCKS}/base.py", BLOCK_TESTS)
fault(
    "frozen experts are trained",
    "nn.Parameter(some.new_empty(shape), some.requires_grad)",
    "nn.Parameter(some.new_empty(shape))",
)
fault("dropout also when evaluating", "if self.training and p > 0:", "if p > 0:")
fault("no dropout within experts", "if self.training and p > 0:", "if False:")
fault(
    "the weights of before come back",
    "parameter.copy_(views[name].reshape(parameter.shape))",
    "parameter.zero_()",
)
fault(
    "what does not belong to the experts loads in silence",
    "unexpected += [k for k in state_dict if k.startswith(prefix) and k not in theirs]",
    "pass",
)
fault("the state_dict has the shapes of ours", ").reshape(shape)", ")")
fault = faults(f"{BLOCKS}/switch_transformers.py", BLOCK_TESTS)
fault(
    "dropped tokens go to expert 0",
    "torch.where(dropped, self.num_experts, ",
    "torch.where(dropped, 0, ",
)
fault = faults(f"{BLOCKS}/nllb_moe.py", BLOCK_TESTS)
fault("token dropout is forgotten when evaluating", "weights * (1 - p))", "weights)")
fault(
    "first and second choice are exchanged",
    "(router_mask, 1 - router_mask), 1)",
    "(1 - router_mask, router_mask), 1)",
)
fault = faults(f"{BLOCKS}/dbrx.py", BLOCK_TESTS)
fault("gate and up are exchanged", '"mlp.w1": gate, "mlp.v1": up', '"mlp.w1": up, "mlp.v1": gate')
fault = faults(f"{BLOCKS}/jetmoe.py", BLOCK_TESTS)
fault("the block's bias is forgotten", "weights) + self.bias", "weights)")
fault(
    "softmax over all experts",
    "torch.softmax(top_k_logits, dim=1)",
    "torch.softmax(logits, dim=1).gather(1, top_k_index)",
)
fault = faults(f"{BLOCKS}/llama4.py", BLOCK_TESTS)
fault(
    "the score scales what comes out",
    "(tokens[:, None] * scores[..., None]).flatten(0, 1)",
    "tokens[:, None].expand(*scores.shape, -1).flatten(0, 1)",
)
fault = faults(f"{BLOCKS}/longcat_flash.py", BLOCK_TESTS)
fault(
    "identity experts give nothing",
    "return routed + (hidden_states * identity).to(routed.dtype)",
    "return routed",
)
fault = faults(f"{BLOCKS}/step3p7.py", BLOCK_TESTS)
fault(
    "no layer is clamped",
    "if module.limit == math.inf else ClampedExperts",
    "if module.limit else ClampedExperts",
)
fault = faults(f"{BLOCKS}/__init__.py", BLOCK_TESTS)
fault(
    "some blocks are replaced before another is refused",
    "    for name, (module, ours) in chosen.items():\n        _check(name, module, ours)\n    for module, ours in chosen.values():\n",
    "    for name, (module, ours) in chosen.items():\n        _check(name, module, ours)\n",
)

# ---- routing health ---------------------------------------------------------------

fault = faults("moe_ext/integrations/transformers/health.py", "tests/integrations/test_health.py")
fault(
    "sentinels count for the last expert",
    "clamp(max=num_experts)",
    "clamp(max=num_experts - 1)",
)
fault("drops are not counted", 'if getattr(experts, "sentinels_are_drops", False):', "if False:")
fault("evaluation moves the biases", '"softmax", experts.training)', '"softmax", True)')
fault("warns again", "self.warned.add((name, problem))", "pass")
fault("warns of a handful of tokens", "< 32 * len(", "< 0 * len(")
fault("a drop rate that is high from the start rises", 'drops > 2 * best["drop_rate"]', "drops > 0")
fault(
    "logs of an evaluation start a new window",
    'or any(key.startswith("eval_") for key in logs)',
    "",
)
fault = faults("moe_ext/stats.py", "tests/integrations/test_health.py::test_sums_over_ranks")
fault(
    "the largest logit is summed over ranks",
    "            total[MAX_LOGIT] = maximum\n",
    "            pass\n",
)
fault = faults("moe_ext/routing.py", "tests/integrations/test_health.py::test_sums_over_ranks")
fault(
    "every rank moves its biases by itself",
    "    if reduces(process_group):\n        dist.all_reduce(counts",
    "    if False:\n        dist.all_reduce(counts",
)
