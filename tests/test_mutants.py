"""The planted faults still fit the sources; `make mutants` says whether the tests catch them."""

from pathlib import Path

import pytest

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
        shared = "".join(p.read_text() for p in (ROOT / "tests").glob("ffn_*.py"))
        assert all(name.partition("[")[0] in text + shared for name in names), test


def test_names_are_unique_and_many():
    for faults in (cpu.FAULTS, cuda.FAULTS):
        assert len({(fault.file, fault.name) for fault in faults}) == len(faults) >= 35
