"""The tests that are worth many schedules: `pytest --backend emulated --emulator-seeds 8 -m schedules`.

What a seed changes is the order in which threads run and copies arrive. So these are the
tests that take every kernel through each of the ways in which its threads wait for each
other, at the smallest sizes that do; the rest of the suite says nothing more in another order.
They are meant to launch every kernel of csrc/cuda/kernels/; nothing checks that yet.
"""

TENSOR_CORES = "tests/test_ffn_kernels.py::TestTensorCores::"
DECODE = "tests/test_ffn_kernels.py::TestDecode::"
EXPERTS = "tests/test_moe_forward.py::TestNumbers::"

SCHEDULES = (  # how their node ids begin
    "tests/test_topk_route.py::test_token_blocks[",
    "tests/test_topk_route.py::test_groups[",
    "tests/test_topk_route.py::test_long_rows[",
    "tests/test_topk_route.py::test_each_gradient_alone[",
    "tests/test_router_logits.py::test_hidden_sizes[",
    "tests/test_router_logits.py::test_backward_slabs[",
    "tests/test_accumulate_stats.py::test_numbers_of_tokens[",
    "tests/test_capacity_scatter.py::test_drop_orders",
    "tests/test_capacity_scatter.py::test_many_segments[",
    "tests/test_capacity_scatter.py::test_weights_that_differ_in_every_digit[",
    "tests/test_weighted_combine.py::test_top_k[",
    "tests/test_gather_rows.py::test_top_k[",
    TENSOR_CORES + "test_tiles[",
    TENSOR_CORES + "test_tf32[",
    TENSOR_CORES + "test_activations[",
    DECODE + "test_tokens[",
    EXPERTS + "test_routings[",
)
