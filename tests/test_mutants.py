"""The planted faults still fit the sources; `make mutants` says whether the tests catch them."""

import subprocess
from pathlib import Path

import pytest

from mutants import run
from mutants.fault import Fault
from mutants.faults import cpu, cuda

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "fault", cpu.FAULTS + cuda.FAULTS, ids=lambda fault: f"{fault.file}: {fault.name}"
)
def test_fault_fits(fault):
    assert (ROOT / fault.file).read_text().count(fault.find) == 1
    assert fault.find != fault.replace and fault.tests
    for test in fault.tests:
        if test.startswith("--"):
            continue
        path, *names = test.split("::")
        text = (ROOT / path).read_text()
        # A method may stand in a class that the file's own one extends.
        shared = "".join(p.read_text() for p in (ROOT / "tests" / "support").glob("ffn_*.py"))
        assert all(name.partition("[")[0] in text + shared for name in names), test


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_a_verdict_older_than_its_file(tmp_path, monkeypatch):
    def git(*arguments):
        settings = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *settings, "-C", tmp_path, *arguments], capture_output=True)

    monkeypatch.setattr(run, "git", git)
    monkeypatch.setattr(run, "commit", lambda: "")
    commits, names = [], ("a.cu", "b.cu")
    git("init", "-q")
    for text in ("one", "two"):
        (tmp_path / "a.cu").write_text(text)
        (tmp_path / "b.cu").write_text("the same")
        git("add", "-A"), git("commit", "-qm", text)
        commits.append(git("rev-parse", "HEAD").stdout.decode()[:10])
    faults = [
        Fault(f"at {c}", file, "", "", ()) for file in names for c in (*commits, commits[1] + "+")
    ]
    lines = [f"caught      1 s  {f.name.removeprefix('at ')}  {f.file}: {f.name}" for f in faults]
    lines.append("caught      1 s  0123456789  b.cu: of no commit")
    faults.append(Fault("of no commit", "b.cu", "", "", ()))
    (tmp_path / "record.txt").write_text("\n".join(lines))
    record = run.Record(tmp_path / "record.txt", faults)
    assert record.older(faults) == [
        f"a.cu: at {commits[0]}", f"a.cu: at {commits[1]}+",
        f"b.cu: at {commits[1]}+", "b.cu: of no commit",
    ]  # fmt: skip
    assert [f.name for f in faults if record.has_caught(f)] == [
        f"at {commits[1]}", f"at {commits[0]}", f"at {commits[1]}",
    ]  # fmt: skip


def test_names_are_unique_and_many():
    for faults in (cpu.FAULTS, cuda.FAULTS):
        assert len({(fault.file, fault.name) for fault in faults}) == len(faults) >= 35
