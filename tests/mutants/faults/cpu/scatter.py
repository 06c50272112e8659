"""Plans, and rows in their order."""

from mutants.fault import collection

FAULTS, faults = collection()

# ---- capacity_scatter ------------------------------------------------------------------------

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

# ---- gather_rows -----------------------------------------------------------------------------

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
    "backward: every token sums the first one's rows",
    "rows.with_index(row + t * top_k)",
    "rows.with_index(row)",
)

fault = faults("csrc/cpu/kernels/weighted_combine.inl", "tests/test_gather_rows.py")
fault(
    "backward: a dropped assignment takes the first row's gradient",
    "if (rows.index[j] < 0) continue;\n      const T* row = row_of<T>(rows, j) + c0;",
    "const T* row = row_of<T>(rows, rows.index[j] < 0 ? 0 : j) + c0;",
)
fault(
    "backward: the sum is rounded after every row",
    "sum[c] += scale * A(to_compute(row[c]));",
    "{ T y; from_compute(y, sum[c] + scale * A(to_compute(row[c]))); sum[c] = to_compute(y); }",
)
fault(
    "backward: every block of the hidden size sums the first one",
    "row_of<T>(rows, j) + c0;",
    "row_of<T>(rows, j);",
)
