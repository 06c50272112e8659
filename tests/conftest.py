"""Seeds, hypothesis and threads for the whole suite; the helpers are in oracle.py.

Every test starts from a seed made of its own name, so that a failure repeats
alone and in any order. MOE_EXT_TEST_SEED=n draws other data for the whole run.
"""

import os
import zlib

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("oracle", "ffn_suite", "ffn_operator")

SEED = int(os.environ.get("MOE_EXT_TEST_SEED", "0"))

hypothesis.settings.register_profile(
    "moe_ext",
    deadline=None,
    derandomize=SEED == 0,
    database=None,
    max_examples=20,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("moe_ext")


def pytest_report_header(config):
    from moe_ext._load import BACKEND

    return (
        f"moe_ext: backend {BACKEND}, MOE_EXT_TEST_SEED={SEED}, threads {torch.get_num_threads()}"
    )


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + SEED)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
