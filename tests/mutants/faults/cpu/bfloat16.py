"""Products of bfloat16 as it is. Only a processor with AVX-512 BF16 runs them, and catches these."""

from mutants.fault import collection

FAULTS, faults = collection()

SETS = "tests/test_instruction_sets.py::test_same_results"
SANITIZED = "tests/test_sanitized_kernels.py"

fault = faults("csrc/cpu/kernels/conversions.inl", SETS)
fault(
    "the pairs of the second vector are the first one's",
    "_mm512_add_epi16(pairs, _mm512_set1_epi16(16))",
    "_mm512_add_epi16(pairs, _mm512_set1_epi16(0))",
)
fault(
    "both elements of a pair come from one row",
    "weave(_mm512_loadu_si512(p), _mm512_loadu_si512(p + stride), left, right);",
    "weave(_mm512_loadu_si512(p), _mm512_loadu_si512(p), left, right);",
)
fault(
    "the elements of a pair of activations change places",
    "_mm512_or_si512(even, _mm512_slli_epi32(odd, 16))",
    "_mm512_or_si512(odd, _mm512_slli_epi32(even, 16))",
)

fault = faults("csrc/cpu/kernels/simd.inl", SETS)
fault(
    "an odd last element is left out",
    "return (k + kElements<L> - 1) / kElements<L>;",
    "return k / kElements<L>;",
)

fault = faults("csrc/cpu/kernels/activation.inl", SETS)
fault(
    "an activation's pair repeats its first column",
    "i + 1 < i1 ? column(i + 1) : V<T>{}",
    "i + 1 < i1 ? column(i) : V<T>{}",
)
fault(
    "all pairs of activations go to the first columns",
    "a.at(first, width, i / kElements<L>)",
    "a.at(first, width, (i - i0) / kElements<L>)",
)

fault = faults("csrc/cpu/kernels/gemm.inl", SETS)
fault(
    "rows of weights an odd number of elements apart are read as pairs",
    "const bool whole_lanes = w.stride_n % kElements<L> == 0;",
    "const bool whole_lanes = true;",
    SANITIZED,
)
fault(
    "an odd last pair of weights is read where it lies",
    "filled == whole * kElements<L> && whole_lanes",
    "(filled + 1) / kElements<L> * kElements<L> == whole * kElements<L> && whole_lanes",
    SANITIZED,
)
fault(
    "weights across k: an odd last row is paired with what lies behind it",
    "e < std::min(each, elements - i * each)",
    "e < each",
    SANITIZED,
)
fault(
    "weights across k: the steps along k are of one row",
    "lane_stride = w.stride_k * each;",
    "lane_stride = w.stride_k;",
)

fault = faults("csrc/cpu/kernels/gemm_tn.inl", SETS)
fault(
    "a weight gradient: an odd last row counts twice",
    "to[c] = {first[c], second ? second[c] : S()};",
    "to[c] = {first[c], second ? second[c] : first[c]};",
)
fault(
    "a weight gradient: rows are paired with themselves",
    "load_two<L>(first + c, second - first, left, right);",
    "load_two<L>(first + c, 0, left, right);",
)
fault(
    "the scratch of a weight gradient is short",
    "scratch.take<L>(kRowsKept * padded<L>(m))",
    "scratch.take<L>(kRowsKept * padded<L>(m) / 8)",
    SANITIZED,
)

fault = faults("csrc/cpu/kernels/microkernels.inl", SETS)
fault(
    "weights across k in place: the steps along k are of one row",
    "w += kElements<L> * stride_k;",
    "w += stride_k;",
)
