"""Logits, scores and choices."""

from mutants.fault import collection

FAULTS, faults = collection()

# ---- router_logits ---------------------------------------------------------------------------

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

# ---- topk_route ------------------------------------------------------------------------------

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
