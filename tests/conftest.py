"""Seeds, hypothesis and threads for the whole suite; the helpers are in oracle.py.

Every test starts from a seed made of its own name, so that a failure repeats
alone and in any order. MOE_EXT_TEST_SEED=n draws other data for the whole run.

`--backend cuda` makes every test's tensors on the GPU.

`--backend emulated` runs the suite over the CUDA sources, in the emulator, which is
built first. Every test then starts the emulator with a seed of its own; MOE_EXT_TEST_SEED
changes these as well, and `--emulator-seeds 8` runs every test with 8 of them. That takes
8 times as long; `-m schedules` selects the tests for which it is worth it, which are few:
emulator/schedules.py.
"""

import contextlib
import os
import sys
import zlib

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("support")

sys.path.insert(0, os.path.dirname(__file__))  # the emulator's and the helpers' modules

from emulator.schedules import SCHEDULES, EveryKernel  # noqa: E402

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


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        choices=("reference", "cpu", "cuda", "emulated"),
        help="sets MOE_EXT_BACKEND; `emulated` builds it first",
    )
    parser.addoption("--emulator-seeds", type=int, default=1, help="emulated runs of every test")
    parser.addoption("--results", help="a JSON file, kept up to date: gpu/progress.py")
    parser.addoption("--emulator-build", choices=("fast", "checked"), default="fast")
    parser.addoption(
        "--emulator-device",
        choices=("sm_80", "sm_86", "sm_90"),
        default="sm_80",
        help="what it pretends to be",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "schedules: worth many of the emulator's seeds")
    backend = config.getoption("--backend")
    if backend:
        os.environ["MOE_EXT_BACKEND"] = backend
    if config.getoption("--results") and not hasattr(config, "workerinput"):
        from gpu.progress import Progress

        config.pluginmanager.register(Progress(config.getoption("--results")))
    if os.environ.get("MOE_EXT_BACKEND") == "cuda":
        torch.set_default_device("cuda")
    if is_emulated():
        os.environ["MOE_EXT_EMULATOR_BUILD"] = config.getoption("--emulator-build")
        if not hasattr(config, "workerinput"):  # xdist: once, before its workers start
            from emulator import build

            build.build(config.getoption("--emulator-build"))
            if selects_schedules(config):
                config.pluginmanager.register(EveryKernel(config.getoption("--emulator-seeds")))
        config.args[:] = [name for arg in config.args for name in with_seeds(config, arg)]


def selects_schedules(config):
    """Whether the run is the whole of `-m schedules`."""
    option, some = config.option, config.args_source is config.ArgsSource.ARGS
    return option.markexpr == "schedules" and not (some or option.keyword or option.collectonly)


def with_seeds(config, argument):
    """The tests of that name: one with parameters, test_x[a], is test_x[0-a] under seed 0."""
    test, bracket, parameters = argument.partition("[")
    seeds = config.getoption("--emulator-seeds")
    if not bracket or seeds == 1:
        return [argument]
    return [f"{test}[{seed}-{parameters}" for seed in range(seeds)]


def pytest_collection_modifyitems(items):
    for item in items:
        if SCHEDULES.search(item.nodeid):
            item.add_marker("schedules")


def is_emulated():
    return os.environ.get("MOE_EXT_BACKEND") == "emulated"


def pytest_generate_tests(metafunc):
    if is_emulated() and metafunc.config.getoption("--emulator-seeds") > 1:
        seeds = range(metafunc.config.getoption("--emulator-seeds"))
        metafunc.parametrize("emulator_seed", seeds, indirect=True)


@pytest.fixture(autouse=True)
def emulator_seed(request):
    """The emulator's seed, which no two tests share; None without it."""
    if not is_emulated():
        yield None
        return
    from emulator import control

    seed = seed_of(request.node.nodeid) + getattr(request, "param", 0)
    device = control.DEVICES.index(request.config.getoption("--emulator-device"))
    yield control.set(seed, device=device)
    # Reports carry this from xdist's workers to EveryKernel.
    request.node.user_properties.append(("launched", (seed, sorted(set(control.launched())))))


def seed_of(nodeid):
    return zlib.crc32(nodeid.partition("[")[0].encode()) + SEED


def pytest_report_header(config):
    from moe_ext._load import BACKEND

    return (
        f"moe_ext: backend {BACKEND}, MOE_EXT_TEST_SEED={SEED}, threads {torch.get_num_threads()}"
    )


@pytest.fixture(autouse=True)
def as_if_on_a_gpu(request):
    """The emulator's tensors are a CPU's; a test that `make gpu` runs must not need that."""
    from gpu.as_if import AsIf
    from gpu.run import LAYER, STAGES

    runs_there = request.path.stem.removeprefix("test_") in {"primitives", *STAGES, *LAYER}
    # Dynamo traces no mode.
    traced = "compile" in request.node.nodeid or "opcheck" in request.node.nodeid
    with AsIf() if is_emulated() and runs_there and not traced else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + SEED)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def inferences(monkeypatch):
    """How often layers took moe_infer, as a list that grows."""
    from moe_ext import inference

    taken, moe_infer = [], inference.moe_infer

    def counted(*args):
        taken.append(args)
        return moe_infer(*args)

    monkeypatch.setattr(inference, "moe_infer", counted)
    return taken
