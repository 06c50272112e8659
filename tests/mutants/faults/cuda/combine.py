"""Rows in a plan's order, and the weighted sum of a token's."""

from mutants.fault import collection

FAULTS, faults = collection()

COMBINE = "tests/test_weighted_combine.py::"
GATHER = "tests/test_gather_rows.py::"

fault = faults("csrc/cuda/kernels/weighted_combine.cu")
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
    "rows without an owner keep what was there",
    "if (p.row_owner[row] >= 0 && p.row_owner[row] < p.owners) continue;",
    "continue;",
    GATHER + "test_routings",
)
fault(
    "a token looks at one row without an owner",
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
