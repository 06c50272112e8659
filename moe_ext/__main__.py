"""python -m moe_ext: a diagnosis that fits an issue report, with a self-test.

The exit code is 0 when every stage is as near to the float64 reference as it has to be, on
every device that torch sees. Where the library does not load, it tells what it was built with
and why it does not fit, and fails.
"""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from . import _load
from .testing import compare_stages


def package_version():
    try:
        return version("moe_ext")
    except PackageNotFoundError:
        return "(not installed, used from its sources)"


def cpu_model():
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def facts():
    """(name, value) pairs: what was built, what runs it, what the machine offers."""
    yield "moe_ext", f"{package_version()}, git {_load.checkout_commit() or 'unknown'}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    library = _load.find_library()
    yield "library", str(library or "none")
    if library is not None:
        built = _load.read_build_info(library)
        yield (
            "built with",
            f"torch {built['torch']}, CUDA {built['cuda'] or 'none'}, Python {built['python']},"
            f" {built['compiler']}, at git {built['git'] or 'unknown'}",
        )
        yield "built for", ", ".join(built["archs"])
        for problem in _load.mismatches(built, _load.running()):
            yield "misfit", problem
    if _load.LOAD_ERROR is not None:
        yield "not loaded", str(_load.LOAD_ERROR)
    yield "backend", f"{_load.BACKEND or 'by device'} (MOE_EXT_BACKEND)"
    yield (
        "cpu",
        f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,"
        f" {torch.backends.cpu.get_cpu_capability()}",
    )
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        unfit = ""
        if (
            library is not None
            and built["cuda"]
            and not _load.runs_on(built["archs"], (major, minor))
        ):
            unfit = (
                f": not built for it. Rebuild: export TORCH_CUDA_ARCH_LIST={_load.arch_list((major, minor))} &&"
                f" {_load.rebuild_command()}"
            )
        yield f"gpu {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}{unfit}"
    for device in devices():
        if sm90_is_refused(device):
            yield (
                "no maps",
                f"{device}: its driver makes no tensor maps, which the kernels for sm_90 need;"
                " those for sm_80 run in their place",
            )


def devices():
    """Those that the library runs on, or plain PyTorch."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if _load.BACKEND == "cuda":
        return gpus
    return ["cpu", *gpus] if _load.BACKEND is None or _load.BACKEND == "reference" else ["cpu"]


def sm90_is_refused(device):
    """Whether only the driver keeps Hopper's kernels from a device; a library for CPUs has no such op."""
    ask = getattr(torch.ops.moe_ext, "sm90_is_refused", None)
    if ask is None or (device == "cpu" and _load.BACKEND != "emulated"):
        return False
    return ask(torch.zeros(1, device=device))


def self_test(dtype, device="cpu"):
    """Every stage of a small layer, forward and backward, against the reference."""
    T, H, I, E = 65, 96, 48, 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)

        def unit(*shape, fan_in=1):
            return torch.randn(shape, dtype=torch.float64).div(fan_in**0.5).to(device, dtype)

        return compare_stages(
            unit(T, H),
            gate=dict(weight=unit(E, H, fan_in=H)),
            experts=dict(up_proj=unit(E, 2 * I, H, fan_in=H), down_proj=unit(E, H, I, fan_in=I)),
            top_k=2,
            scatter=dict(capacity=20),
        )


def main():
    for name, value in facts():
        print(f"{name:<11} {value}")
    if _load.LOAD_ERROR is not None:
        print("FAIL")
        return 1
    dtypes = (torch.float32, torch.bfloat16)
    results = [report(dtype, device) for device in devices() for dtype in dtypes]
    passed = all(results) and bool(results)
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def report(dtype, device):
    """Prints the self-test's line for a dtype on a device, all rows where one is off; whether it passed."""
    name = f"{device} {str(dtype).removeprefix('torch.')}"
    try:
        comparison = self_test(dtype, device)
    except Exception as error:  # whatever a broken build does belongs into the issue report
        print(f"self-test   {name}: {type(error).__name__}: {str(error).splitlines()[0]:.200}")
        return False
    worst = max(comparison, key=lambda row: row.error / max(row.limit, 1e-30))
    print(
        f"self-test   {name}: {'ok' if comparison.ok else 'OFF'}, nearest to its limit:"
        f" {worst.stage} {worst.result}, error {worst.error:.1e} of {worst.limit:.1e}"
    )
    if not comparison.ok:
        print(comparison)
    return comparison.ok


if __name__ == "__main__":
    sys.exit(main())
