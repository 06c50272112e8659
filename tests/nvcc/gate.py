"""What nvcc says of the kernels, on a machine without a GPU.

    python tests/nvcc/gate.py              compiles what changed, checks, compares
    python tests/nvcc/gate.py --update     and rewrites the table of resources

Compiles every csrc/cuda/kernels/*.cu for sm_80 and sm_90a, without torch, and fails

- on any warning of nvcc or ptxas, and where registers are spilled to local memory;
- where registers, shared memory or stack of a kernel differ from resources.md beside this
  file, so that a change of them is seen in its commit. The table is one nvcc's: under
  another one, only the rest is checked;
- where the tensor cores' kernels break machine_code.py's rules. That needs nvdisasm, which no
  toolkit is asked for: `pip install nvidia-cuda-nvdisasm` has it.

Objects stay in build/nvcc/, and ninja compiles what changed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from machine_code import check_machine_code

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "nvcc"
TABLE = Path(__file__).with_name("resources.md")
ARCHS = ("sm_80", "sm_90a")
FLAGS = "-std=c++17 -O3 -Xptxas -v -Xptxas -warn-spills"


class Kernel(NamedTuple):
    file: str
    name: str
    registers: int
    shared: int  # bytes, static; the dynamic part is the launch's
    stack: int  # bytes a thread


# ---- compiling --------------------------------------------------------------------


def tool(name):
    """A program of this Python's environment, else one on the PATH, else None."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def find_nvdisasm():
    import importlib.util

    package = importlib.util.find_spec("nvidia")
    for place in package.submodule_search_locations if package else ():
        for found in sorted(Path(place).glob("*/bin/nvdisasm")):
            return str(found)
    return tool("nvdisasm")


def find_nvcc():
    for name in ("CUDA_HOME", "CUDA_PATH"):
        nvcc = Path(os.environ.get(name, "/nowhere")) / "bin" / "nvcc"
        if nvcc.exists():
            return str(nvcc)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc gate: no nvcc on the PATH, and CUDA_HOME names no toolkit: NOT CHECKED")
    return nvcc


def compile_all(nvcc):
    """{(file, arch): its cubin}, up to date; a compiler's words lie beside each as .log."""
    lines = [
        f"builddir = {BUILD}",
        "rule cubin",
        # A warning is no error to nvcc: its words are kept, and judged below.
        f"  command = {nvcc} {FLAGS} -arch=$arch -I{ROOT / 'csrc'} -MD -MF $out.d -cubin"
        " $in -o $out > $out.log 2>&1 || (cat $out.log; rm -f $out; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in for $arch",
    ]
    cubins = {}
    for source in sorted(ROOT.glob("csrc/cuda/kernels/*.cu")):
        for arch in ARCHS:
            cubin = BUILD / f"{source.stem}.{arch}.cubin"
            cubins[source.stem, arch] = cubin
            lines += [f"build {cubin}: cubin {source} | {nvcc}", f"  arch = {arch}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [tool("ninja") or "ninja", "-f", BUILD / "build.ninja", "-k", "0", *jobs]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit("nvcc gate: the kernels do not compile")
    return cubins


# ---- what the compilers said ---------------------------------------------------------


def demangle(names):
    """Names as C++ writes them, without parameters, return types and our namespaces."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = {}
    for mangled, name in zip(names, done.stdout.splitlines()):
        name = name.replace("(anonymous namespace)::", "").replace("moe_ext::cuda::", "")
        name = re.sub(r"^void ", "", name)
        depth = 0
        for i, letter in enumerate(name):  # the parameters begin at the first outer (
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                name = name[:i]
                break
        short[mangled] = re.sub(r"\((?:int|unsigned int|bool)\)", "", name)
    return short


def read_log(file, text):
    """The kernels that a log of `ptxas -v` tells of, and what there is to complain about."""
    kernels, complaints = [], []
    mangled = stack = None
    for line in text.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            mangled, stack = m[1], None
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill", line):
            stack = int(m[1]) if stack is None else stack  # called functions' lines follow
            if not re.search(r"\b0 bytes spill stores, 0 bytes spill loads", line):
                complaints.append(f"{file}: {mangled}: {line.strip()}")
        elif m := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels.append(Kernel(file, mangled, int(m[1]), int(shared[1]) if shared else 0, stack))
        elif re.search(r"warning|error|\bC7\d\d\d\b", line, re.IGNORECASE):
            complaints.append(f"{file}: {line.strip()}")
    names = demangle([kernel.name for kernel in kernels])
    return [kernel._replace(name=names[kernel.name]) for kernel in kernels], complaints


# ---- the table ------------------------------------------------------------------------


def release(nvcc):
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", said)[1]


def table(kernels, version):
    """The text of resources.md. kernels: {arch: [Kernel, ...]}"""
    text = [
        "# The kernels' resources",
        "",
        f"Written by `make nvcc ARGS=--update` with nvcc {version}; `make nvcc` fails where a kernel",
        "differs. For each architecture: registers per thread / bytes of static shared memory (the",
        "kernels' files say what a launch asks for dynamically) / bytes of stack per thread, where",
        "arrays live whose indices are known only at run time. Nothing is spilled.",
    ]
    by_name = {}
    for arch, found in kernels.items():
        for kernel in found:
            resources = f"{kernel.registers} / {kernel.shared} / {kernel.stack}"
            by_name.setdefault((kernel.file, kernel.name), {}).setdefault(arch, []).append(
                resources
            )
    file = None
    for (of, name), resources in sorted(by_name.items()):
        if of != file:
            file = of
            text += ["", f"## {file}.cu", "", f"| kernel | {' | '.join(ARCHS)} |"]
            text += ["| --- |" + " ---: |" * len(ARCHS)]
        # Overloads share a name here: their resources stand in one cell.
        cells = [", ".join(sorted(resources.get(arch, ["-"]))) for arch in ARCHS]
        text.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def compare(new, update):
    """Complaints about a table that is not what is committed."""
    if update:
        TABLE.write_text(new)
        return []
    if not TABLE.exists():
        return [f"{TABLE.relative_to(ROOT)} is missing: `make nvcc ARGS=--update` writes it"]
    old = TABLE.read_text()

    def nvcc_of(text):
        found = re.search(r"nvcc (\d[\d.]*);", text)
        return found and found[1]

    if nvcc_of(old) != nvcc_of(new):
        print(f"the table is nvcc {nvcc_of(old)}'s, this is {nvcc_of(new)}: not compared")
        return []
    gone = [f"- {line}" for line in old.splitlines() if line not in new.splitlines()]
    come = [f"+ {line}" for line in new.splitlines() if line not in old.splitlines()]
    if gone or come:
        return [f"{TABLE.relative_to(ROOT)} differs (`make nvcc ARGS=--update`):", *gone, *come]
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="rewrite resources.md")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    cubins = compile_all(nvcc)
    kernels, complaints = {arch: [] for arch in ARCHS}, []
    for (file, arch), cubin in cubins.items():
        found, bad = read_log(file, Path(f"{cubin}.log").read_text())
        kernels[arch] += found
        complaints += [f"{arch}: {line}" for line in bad]
    complaints += compare(table(kernels, release(nvcc)), arguments.update)
    complaints += check_machine_code(cubins, find_nvdisasm(), demangle)
    counts = ", ".join(f"{len(found)} for {arch}" for arch, found in kernels.items())
    print(f"nvcc gate: {len(cubins) // len(ARCHS)} files, kernels: {counts}")
    if complaints:
        sys.exit("\n".join(["nvcc gate: FAILED", *complaints]))
    print("nvcc gate: passed")


if __name__ == "__main__":
    main()
