"""The tests that are worth many schedules: `pytest --backend emulated --emulator-seeds 8 -m schedules`.

What a seed changes is the order in which threads run and copies arrive. So these are the
tests that take every kernel through each of the ways in which its threads wait for each
other, at the smallest sizes that do; the rest of the suite says nothing more in another order.
Run whole, they must launch every kernel of csrc/cuda/kernels/ under all the seeds: EveryKernel.
"""

import re

import pytest

from emulator import build

TENSOR_CORES = r"test_ffn_kernels.py::TestTensorCores::"
HOPPER = r"test_ffn_kernels_sm90.py::TestHopper::"
DECODE = r"test_ffn_kernels.py::TestDecode::"
EXPERTS = r"test_moe_forward.py::TestNumbers::"

# What their node ids match. Where a parameter changes no wait (a bias, a score function, the
# second 16-bit dtype), one value of it will do.
SCHEDULES = re.compile(
    "|".join(
        (
            r"test_topk_route.py::test_token_blocks\[",
            r"test_topk_route.py::test_groups\[.*True-.*-softmax-dtype1",
            r"test_topk_route.py::test_long_rows\[.*(dtype0-513|dtype1-1024|dtype1-1100)",
            r"test_topk_route.py::test_each_gradient_alone\[",
            r"test_router_logits.py::test_hidden_sizes\[",
            r"test_router_logits.py::test_backward_slabs\[",
            r"test_accumulate_stats.py::test_numbers_of_tokens\[",
            r"test_capacity_scatter.py::test_drop_orders\b",
            r"test_capacity_scatter.py::test_many_segments\[.*sentinels",
            r"test_capacity_scatter.py::test_weights_that_differ_in_every_digit\[",
            r"test_weighted_combine.py::test_top_k\[",
            r"test_gather_rows.py::test_top_k\[",
            TENSOR_CORES + r"test_tiles\[.*layout[01]",
            TENSOR_CORES + r"test_tf32\[.*layout[01]",
            TENSOR_CORES + r"test_activations\[",
            HOPPER + r"test_layouts\[.*dtype0",
            HOPPER + r"test_several_turns\[.*layout[01]",
            DECODE + r"test_tokens\[.*False-.*dtype[02]",
            EXPERTS + r"test_routings\[.*(skewed|sentinels)",
        )
    )
)


def kernels():
    """The names under which the sources launch kernels; one may have a name for each tile."""
    files = (build.ROOT / "csrc/cuda/kernels").glob("*.cu*")
    text = "".join(f.read_text() for f in files)
    named = re.findall(r"(?:stream,|kName =)[^;}]*[;}]|kTiles\[\] = .*?};", text, re.DOTALL)
    return set(re.findall(r'"([^"]+)"', "".join(named)))


class EveryKernel:
    """A plugin for pytest: the run fails where a kernel was launched under fewer seeds."""

    def __init__(self, seeds):
        self.seeds = seeds
        self.seeds_of = {name: set() for name in kernels()}

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            for seed, names in dict(report.user_properties).values():
                for name in names:  # one that kernels() has not found is a KeyError
                    self.seeds_of[name].add(seed)

    def lacking(self):
        return sorted(n for n, seeds in self.seeds_of.items() if len(seeds) < self.seeds)

    @pytest.hookimpl(tryfirst=True)  # before the summary is printed
    def pytest_sessionfinish(self, session):
        if self.lacking():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for name in self.lacking():
            seeds = len(self.seeds_of[name])
            terminalreporter.write_line(f"LACKING {name}: {seeds} of {self.seeds} seeds", red=True)
        if not self.lacking():
            n = len(self.seeds_of)
            terminalreporter.write_line(f"{n} kernels, each under {self.seeds} seeds or more")
