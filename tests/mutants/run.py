"""Plants faults, one at a time, and checks that the tests catch each of them.

    make mutants                        all of them
    make mutants ARGS="combine -j 1"    those whose name or file has "combine", one worker
    make mutants ARGS=--list            their names
    make mutants ARGS="--kernels route" those of the CUDA kernels, of which the name or file
                                        has "route"; the emulator runs the tests
    make mutants ARGS=--record          writes the verdicts to results/cpu.txt (kernels.txt),
                                        in place of the older ones of the same faults
    make mutants ARGS="--record --new"  only those that the record does not call caught, or
                                        did before their file last changed

The faults stand in faults/, a file a stage. A worker plants them in a copy of the sources
of its own, under build/mutants/, rebuilds what changed and runs the tests that are named
with the fault; the sources here are not touched. The emulated libraries are built here,
once, and copied: a fault compiles the kernels that hold it. One that does not compile, or
keeps the tests from starting, proves nothing: it counts as broken. One whose tests never
end is caught by the processor time that they take, since the clock would also run on a
machine that others keep busy.

The run also fails where the recorded verdict on one of its faults is older than the file that
the fault spoils, or was found in sources that were not committed.
"""

import argparse
import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the lists import each other as the suite imports them

from emulator import build as emulated  # noqa: E402
from mutants.fault import CHECKED  # noqa: E402
from mutants.faults import cpu, cuda  # noqa: E402

COPIES = ROOT / "build" / "mutants"
COPIED = ("moe_ext", "csrc", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
RESULTS = ROOT / "tests" / "mutants" / "results"
PROCESSOR_LIMIT = 300  # seconds that the tests of one fault may compute,
CLOCK_LIMIT = 3600  # and that they may take if they only wait


def refresh(copy):
    """Brings a worker's copy of the sources up to date; what is equal keeps its time stamp."""
    wanted = set()
    for top in map(ROOT.joinpath, COPIED):
        for source in [top] if top.is_file() else top.rglob("*"):
            if source.is_dir() or source.suffix in (".so", ".pyc"):
                continue
            target = copy / source.relative_to(ROOT)
            wanted.add(target)
            if not target.exists() or not filecmp.cmp(source, target, shallow=False):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
    for top in map(copy.joinpath, COPIED):
        for target in top.rglob("*") if top.is_dir() else ():
            if target.is_file() and target.suffix not in (".so", ".pyc") and target not in wanted:
                target.unlink()


def emulator_of(fault):
    """The kind of emulator that runs a fault's tests."""
    return "checked" if CHECKED in fault.tests else "fast"


def clone(copy, faults):
    """A worker's copy for the kernels: sources and emulated libraries, with their times."""
    shutil.rmtree(copy, ignore_errors=True)
    built = {emulated.folder(emulator_of(fault)).relative_to(ROOT) for fault in faults}
    for name in (*COPIED, *built):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.pyc"))
        else:
            shutil.copy2(ROOT / name, copy / name)


def run(copy, *command, limited=True):
    """(exit code, what it said); below 0 where a signal ended it, None where the clock did."""
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "MAX_JOBS": "1",
    }
    if limited:  # -S: with SIGXCPU, which nobody else sends
        command = ("sh", "-c", f'ulimit -S -t {PROCESSOR_LIMIT}; exec "$@"', "sh", *command)
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, timeout=CLOCK_LIMIT if limited else None,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        return None, str(expired)
    return done.returncode, done.stdout


def build_emulator(copy, kind):
    file = emulated.folder(kind).relative_to(ROOT) / "build.ninja"
    return run(copy, emulated.ninja(), "-f", file)


def build_cpu(copy, **options):
    return run(copy, sys.executable, "setup.py", "build_ext", "--inplace", **options)


def run_tests(copy, kernels, tests, **options):
    backend = ["--backend", "emulated"] if kernels else []
    quiet = ["-q", "-x", "-p", "no:cacheprovider"]
    return run(copy, sys.executable, "-m", "pytest", *quiet, *backend, *tests, **options)


def plant(copy, kernels, fault):
    """(verdict, what the tools said): caught, SURVIVED or BROKEN."""
    path = copy / fault.file
    original = path.read_text()
    path.write_text(original.replace(fault.find, fault.replace))
    try:
        if fault.file.startswith("csrc"):
            code, output = build_emulator(copy, emulator_of(fault)) if kernels else build_cpu(copy)
            if code:
                return "BROKEN", output
        code, output = run_tests(copy, kernels, fault.tests)
    finally:
        path.write_text(original)
    if code == 0:
        return "SURVIVED", output
    # 1: a test failed; a signal: it crashed, or computed for too long. All else proves nothing:
    # pytest never ran a test, somebody killed it, or the machine stood still.
    crashed = code is not None and code < 0 and code != -signal.SIGKILL
    return ("caught" if code == 1 or crashed else "BROKEN"), output


def set_up(copy, kernels, faults):
    """A worker's copy, built, whose tests pass as long as nothing is planted."""
    if kernels:
        clone(copy, faults)
        code = 0
    else:
        refresh(copy)
        code, output = build_cpu(copy, limited=False)  # everything; a fault rebuilds one file
    by_options = {}
    for fault in faults:
        options = tuple(test for test in fault.tests if test.startswith("--"))
        by_options.setdefault(options, set()).update(set(fault.tests) - set(options))
    for options, tests in by_options.items():
        if code == 0:
            code, output = run_tests(copy, kernels, sorted(tests) + [*options], limited=False)
    if code:
        sys.exit(f"without any fault, in {copy}:\n{output}")


def reason(output):
    """The line that says by what a fault was caught: the emulator's word, or the failed test."""
    if said := re.search(r"emulator: .*", output):
        return said[0]
    lines = output.splitlines()
    for start in ("FAILED", "ERROR", "E  ", "Fatal"):
        for line in lines:
            if line.startswith(start):
                return line
    return lines[-1] if lines else ""


def git(*arguments):
    return subprocess.run(["git", "-C", ROOT, *arguments], text=True, capture_output=True)


def commit():
    """The commit of the sources, with a + where they differ from it."""
    others = [*COPIED, f":!{RESULTS.relative_to(ROOT)}"]
    changed = git("diff", "--quiet", "HEAD", "--", *others).returncode
    return (git("rev-parse", "--short=10", "HEAD").stdout.strip() or "?") + "+" * bool(changed)


class Record:
    """The verdicts on a list of faults in a file, a line each, in the list's order.

    A run of some faults replaces their lines; what is said of faults that are no longer in
    the list is dropped. A line names the commit at which its fault was run.
    """

    LINE = re.compile(r"(\w+) +(\d+) s  (\S+)  (.*)")

    def __init__(self, path, faults):
        self.path = path
        self.names = [f"{fault.file}: {fault.name}" for fault in faults]
        self.commit = commit()
        self.verdicts = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            if match := self.LINE.fullmatch(line):
                *verdict, name = match.groups()
                self.verdicts[name] = verdict
        self.lock = Lock()

    def has_caught(self, fault):
        name = f"{fault.file}: {fault.name}"
        return self.verdicts.get(name, ("",))[0] == "caught" and not self.is_older(name)

    def is_older(self, name):
        """Whether a verdict says nothing of its file as it is: that has changed since, or differed
        from its commit even then, or the commit is unknown here."""
        commit, file = self.verdicts[name][2], name.partition(": ")[0]
        difference = git("diff", "--quiet", commit, "--", file)
        return commit.endswith("+") or difference.returncode != 0

    def older(self, faults):
        """The names of those whose verdict is older than their file."""
        names = [f"{fault.file}: {fault.name}" for fault in faults]
        return [name for name in names if name in self.verdicts and self.is_older(name)]

    def add(self, name, verdict, seconds):
        with self.lock:
            self.verdicts[name] = (verdict, f"{seconds:.0f}", self.commit)
            self.write()  # each time: a run that is stopped has said what it knows

    def write(self):
        said = {name: self.verdicts[name] for name in self.names if name in self.verdicts}
        lines = [
            f"{verdict:8} {seconds:>4} s  {commit}  {name}"
            for name, (verdict, seconds, commit) in said.items()
        ]
        caught = sum(verdict == "caught" for verdict, *_ in said.values())
        summary = f"{caught} of {len(self.names)} faults caught"
        if len(said) < len(self.names):
            summary += f", {len(self.names) - len(said)} not run"
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("\n".join([*lines, summary, ""]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", help="take the faults whose name or file has one of these"
    )
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count(), help="workers")
    parser.add_argument(
        "--kernels", action="store_true", help="the faults of the CUDA kernels, in the emulator"
    )
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument(
        "--record", action="store_true", help="write the verdicts to tests/mutants/results/"
    )
    parser.add_argument("--new", action="store_true", help="leave out what the record calls caught")
    options = parser.parse_args()
    known = (cuda if options.kernels else cpu).FAULTS
    kind = "kernels" if options.kernels else "cpu"
    record = Record(RESULTS / f"{kind}.txt", known)
    faults = [
        fault
        for fault in known
        if not options.words or any(word in f"{fault.file} {fault.name}" for word in options.words)
        if not (options.new and record.has_caught(fault))
    ]
    if options.list:
        for fault in faults:
            print(f"{fault.file}: {fault.name}")
        return
    for fault in faults:
        if (ROOT / fault.file).read_text().count(fault.find) != 1:
            sys.exit(f"{fault.file}: {fault.name}: the text to replace must occur exactly once")

    begin = time.time()
    if options.kernels:
        for emulator in {emulator_of(fault) for fault in faults}:
            emulated.build(emulator)
    jobs = max(1, min(options.jobs, len(faults)))
    copies = [COPIES / f"{kind}-{worker}" for worker in range(jobs)]
    # Every worker takes a run of neighbours, so that a file is rarely rebuilt unchanged.
    shares = [
        faults[worker * len(faults) // jobs : (worker + 1) * len(faults) // jobs]
        for worker in range(jobs)
    ]
    results = SimpleQueue()

    def work(copy, share):
        set_up(copy, options.kernels, share)
        for fault in share:
            started = time.time()
            verdict, output = plant(copy, options.kernels, fault)
            seconds = time.time() - started
            name = f"{fault.file}: {fault.name}"
            results.put(verdict)
            print(f"{verdict:8} {seconds:4.0f} s  {name}", flush=True)
            if options.record:
                record.add(name, verdict, seconds)
            print(f"    {reason(output)}" if verdict == "caught" else output, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work, copy, share) for copy, share in zip(copies, shares)]:
            done.result()
    verdicts = [results.get() for _ in faults]
    caught = verdicts.count("caught")
    print(f"{caught} of {len(faults)} faults caught in {time.time() - begin:.0f} s")
    older = record.older(faults)
    for name in older:
        print(f"older than its file (ARGS='--record --new' runs it): {name}")
    sys.exit(caught < len(faults) or bool(older))


if __name__ == "__main__":
    main()
