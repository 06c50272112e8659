"""The CPU's matrix kernels, compiled without torch, under the address sanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from moe_ext._load import BACKEND

pytestmark = pytest.mark.skipif(BACKEND not in (None, "cpu"), reason="the CPU's own kernels")

ROOT = Path(__file__).resolve().parents[1]
SETS = torch.ops.moe_ext.cpu_instruction_sets() if BACKEND in (None, "cpu") else []
OPERANDS = [(name, "float") for name in sorted(SETS) if name != "avx512_bf16"]
OPERANDS += [(name, "double") for name in sorted(SETS) if name != "avx512_bf16"]
OPERANDS += [(name, "bf16") for name in SETS if name == "avx512_bf16"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, which brings the sanitizer")
    folder = tmp_path_factory.mktemp("sanitized")
    kernels = ROOT / "csrc" / "cpu" / "kernels"
    sources = [ROOT / "tests" / "sanitized" / "kernels.cpp", *sorted(kernels.glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-g", "-w", "-fsanitize=address", f"-I{kernels}"]
    objects = [folder / f"{source.stem}_{i}.o" for i, source in enumerate(sources)]
    for source, to in zip(sources, objects):
        subprocess.run([compiler, *flags, "-c", str(source), "-o", str(to)], check=True)
    subprocess.run([compiler, *flags, *map(str, objects), "-o", folder / "kernels"], check=True)
    return folder / "kernels"


@pytest.mark.parametrize("name, operand", OPERANDS)
def test_no_access_outside(program, name, operand):
    done = subprocess.run(
        [program, operand], env=os.environ | {"MOE_EXT_CPU": name}, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout == f"{operand} on {name}: 0 failures\n"
