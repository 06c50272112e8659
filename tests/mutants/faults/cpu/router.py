"""Logits, scores and choices."""

from mutants.fault import collection

FAULTS, faults = collection()

# ---- router_logits ---------------------------------------------------------------------------

fault = faults("csrc/cpu/router_logits.cpp", "tests/test_router_logits.py")
fault(
    "the second block of experts takes the first one's bias",
    "bias ? bias + e : nullptr",
    "bias",
)
fault(
    "backward: the second block of rows multiplies the first one's gradients",
    "left.from_column(m), right",
    "left, right",
)
fault(
    "backward: the second block of columns multiplies the first one's rows",
    "right.from_column(n), std::min",
    "right, std::min",
)

fault = faults("csrc/cpu/kernels/router_logits.inl", "tests/test_router_logits.py")
fault(
    "a slab of the hidden size forgets the ones before",
    "c.data[r * c.ld + e] += sum_as_tree",
    "c.data[r * c.ld + e] = sum_as_tree",
)
fault(
    "what pads a row to whole vectors is not cleared",
    "copy + (r + 1) * depth, A(0));",
    "copy + (r + 1) * depth, A(1));",
)
fault(
    "float32 x beside another weight is read as if it were contiguous",
    "count, depth, rows.stride};",
    "count, depth, hidden};",
)

fault = faults("csrc/cpu/kernels/gemm_tn.inl", "tests/test_router_logits.py")
fault(
    "backward: terms past the first 256 are forgotten",
    "std::min(rows, chunk * KC_TN)",
    "std::min(KC_TN, chunk * KC_TN)",
)

fault = faults("csrc/cpu/kernels/sums.inl", "tests/test_router_logits.py")
fault(
    "backward: the bias takes its gradient from the last token",
    "sum[c] += a.data[r * a.ld + c];",
    "sum[c] = a.data[r * a.ld + c];",
)

fault = faults("csrc/cpu/kernels/conversions.inl")
fault(
    "bfloat16 is truncated instead of rounded",
    "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;",
    "bits >> 16;",
    "tests/test_weighted_combine.py",
)
fault(
    "an infinite float16 is read as 65536",
    "(bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;",
    "0u;",
    "tests/test_weighted_combine.py",
    "tests/test_router_logits.py",
)

fault = faults("csrc/cpu/kernels/exp.inl")
fault(
    "the exponential of a score is off by 1e-5 below -1",
    "return bit_cast<float>(bit_cast<uint32_t>(y) & keep);",
    "return x < -1.0f ? 1.00001f * y : y;",
    "tests/test_topk_route.py",
)

# ---- topk_route ------------------------------------------------------------------------------

fault = faults("csrc/cpu/kernels/topk_route.inl", "tests/test_topk_route.py")
fault(
    "a tie goes to the higher expert id",
    "candidate < id ? candidate : id;",
    "id == std::numeric_limits<int32_t>::max() || candidate > id ? candidate : id;",
)
fault(
    "a NaN logit ranks as a number of its bits",
    "bit_cast<K>((x == x ? x : -kInf<A>)+A(0))",
    "bit_cast<K>(x + A(0))",
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
    "std::fill_n(out, E, T());",
    "for (int64_t e = 0; e < E; ++e) from_compute(out[e], A(1));",
)

fault = faults("csrc/cpu/topk_route.cpp", "tests/test_topk_route.py")
fault(
    "counts take sentinels for the last expert's",
    "if (ids[a] < E) ++count[ids[a]];",
    "++count[std::min<int64_t>(ids[a], E - 1)];",
)
fault(
    "every block of tokens takes the first one's padding",
    "rows_of(l).from_row(t), bias_data, padding ? padding + t : nullptr",
    "rows_of(l).from_row(t), bias_data, padding",
)
