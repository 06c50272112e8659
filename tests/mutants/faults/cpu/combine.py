"""The weighted sum of a token's rows."""

from mutants.fault import collection

FAULTS, faults = collection()

fault = faults("csrc/cpu/kernels/weighted_combine.inl", "tests/test_weighted_combine.py")
fault(
    "a block of the hidden size leaves out its last element",
    "store_rows<A>(out.from_column(c0), {sum, 1, count, 0});",
    "store_rows<A>(out.from_column(c0), {sum, 1, count - (c0 > 0), 0});",
)
fault(
    "the weight is left out of the sum",
    "weight ? weight[j] : A(1)",
    "A(1)",
)
fault(
    "backward: the rows' gradient without the weight",
    "from_compute(drow[c], weight * A(to_compute(dy[c])));",
    "from_compute(drow[c], A(to_compute(dy[c])));",
)
fault(
    "backward: the weights' gradient keeps its last block alone",
    "    total += sum;",
    "    total = sum;",
)

fault = faults("csrc/cpu/weighted_combine.cpp", "tests/test_weighted_combine.py")
fault(
    "backward: every token's gradient is the first choice's token",
    "upstream.from_row(assignment / top_k)",
    "upstream.from_row(assignment % top_k)",
)
fault(
    "backward: the tail of the rows' gradient is not cleared",
    "std::memset(drow.data, 0, row_bytes)",
    "std::memset(drow.data, 1, row_bytes)",
)
