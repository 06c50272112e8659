"""The emulator reports what is wrong in a kernel: which kernel, block, thread, line.

The kernels of kernels/faulty.cu have a fault each. Some the emulator reports in any
build; of some a fast build only gives wrong results, which a stage's tests see, and a
checked one (--emulator-build checked) says what is wrong.
"""

import os
import re

import pytest
import torch

from emulator import micro as micro_kernels

pytestmark = pytest.mark.skipif(
    micro_kernels.BACKEND != "emulated", reason="needs --backend emulated"
)
CHECKED = os.environ.get("MOE_EXT_EMULATOR_BUILD") == "checked"


def run(micro, name, seed, **settings):
    """What a faulty kernel made of its 1,022 ints, all zero; and what was said."""
    from emulator import control

    control.set(seed, **settings)
    memory = torch.zeros(1022, dtype=torch.int32)
    code, message = micro.run("fault", name.encode(), memory)
    assert code in (0, -1)
    return memory, message if code else ""


REPORTED = {  # kernel: what the report says
    "divergent_barrier": r"divergent barrier 0: other lanes of warp [01] are at .*faulty.cu:\d+",
    "barrier_left_out": r"deadlock.*threads 0-31: at barrier 1 \(32 of 64 have come\)",
    "barrier_of_two_sizes": r"barrier 1 is for (64|96) threads here and for (64|96) elsewhere",
    "shuffle_after_exit": r"exits, but lanes|names lanes \w+, which have exited",
    "mixed_collectives": r"divergence: __(shfl|ballot)_sync .* wait in __(shfl|ballot)_sync",
    "mask_without_self": r"mask 0000ffff leaves out the lane that calls, (1[6-9]|2\d|3[01])\b",
    "past_the_end": r"out of bounds|is no device memory",
    "misaligned_copy": r"cp.async: the source \w+ is not a multiple of 16",
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", REPORTED)
def test_reported_by_every_build(micro, name, seed):
    _, message = run(micro, name, seed)
    assert re.search(REPORTED[name], message, re.DOTALL), message
    assert message.startswith(f"emulator: kernel {name}, block (0,0,0)"), message
    assert re.search(rf"{name} \[faulty.cu:\d+\]", message), message


@pytest.mark.parametrize("seed", range(2))
def test_livelock(micro, seed):
    from emulator import control

    control.set(seed)
    memory = torch.full((1022,), 77, dtype=torch.int32)
    code, message = micro.run("fault", b"endless_spin", memory)
    assert code == -1 and "livelock" in message


@pytest.mark.parametrize("name", ["just_past_the_end", "past_dynamic_smem"])
def test_writes_into_a_margin_are_noticed(micro, name):
    for seed in range(4):
        message = run(micro, name, seed)[1]
        expected = "past a tensor's storage of 4088 bytes|dynamic shared memory"
        if CHECKED:  # at once, and not only after the launch
            expected = "offset 4088 of a tensor's storage of 4088 bytes|dynamic shared memory"
        assert re.search(expected, message), message
        assert name in message


WRONG = {  # kernel: what it would give without its fault
    "no_wait_for_a_copy": lambda: [0] * 64,
    "unwritten_smem": lambda: [1] * 32,
    "no_barrier": lambda: [63 - i for i in range(64)],
    "no_barrier_before_reuse": lambda: [6] * 64,
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_under_some_seed(micro, name):
    expected = torch.tensor(WRONG[name](), dtype=torch.int32)
    results = [run(micro, name, seed) for seed in range(8)]
    if CHECKED:
        for _, message in results:
            assert re.search("shared memory", message), message
            assert re.search(rf"{name} \[faulty.cu:\d+\]", message), message
    else:
        assert any(not torch.equal(memory[: len(expected)], expected) for memory, _ in results)


CHECKED_ONLY = {
    "shuffle_orders_nothing": r"race: read of byte \d+ of shared memory",
    "blocks_write_one_place": r"race: write of byte 0 of a tensor's storage",
    "last_block_without_fence": r"race: read of byte \d+ of a tensor's storage",
    "last_block_without_second_fence": r"race: read of byte \d+ of a tensor's storage",
    "last_block_without_barrier": r"race: read of byte \d+ of a tensor's storage",
    "shuffle_orders_no_tensor": r"race: read of byte \d+ of a tensor's storage",
    "overwritten_while_read": r"race: (read|write) of byte \d+ of a tensor's storage",
    "misaligned_vector": r"misaligned",
    "anothers_local_memory": r"another thread's local memory",
    "host_memory": r"which is no device memory",
}


@pytest.mark.skipif(not CHECKED, reason="needs --emulator-build checked")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CHECKED_ONLY)
def test_reported_by_a_checked_build(micro, name, seed):
    message = run(micro, name, seed)[1]
    assert re.search(CHECKED_ONLY[name], message), message
    assert re.search(rf"{name} \[faulty.cu:\d+\]", message), message


def test_an_unfinished_copy_reads_as_nan_unless_it_came_early(micro):
    from emulator import control

    if CHECKED:
        return
    assert (run(micro, "no_wait_for_a_copy", 1, delivery=control.LATEST)[0][32:64] == -1).all()
    assert (run(micro, "no_wait_for_a_copy", 1, delivery=control.EAGER)[0][32:64] == 0).all()


def test_fresh_tensors_are_nan():
    for shape in [(3,), (1000, 7)]:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert torch.empty(shape, dtype=dtype).isnan().all()
        assert (torch.empty(shape, dtype=torch.int32) == 0x7FFF7FFF).all()  # and no index
