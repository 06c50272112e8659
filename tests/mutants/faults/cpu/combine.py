"""The weighted sum of a token's rows."""

from mutants.fault import collection

FAULTS, faults = collection()

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
