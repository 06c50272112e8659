"""What a planted fault is, and how a list of them is written down."""

from typing import NamedTuple

# Among a fault's tests: the emulator's build that also knows what a GPU does not promise.
CHECKED = "--emulator-build=checked"


class Fault(NamedTuple):
    name: str  # what is wrong
    file: str
    find: str  # occurs exactly once in the file
    replace: str
    tests: tuple[str, ...]  # pytest arguments; one of these tests must fail


def collection():
    """A list, and faults(file, *tests), whose fault(name, find, replace, *tests) adds to it.

    A fault without tests of its own is for those of its file.
    """
    collected = []

    def faults(file, *tests):
        def fault(name, find, replace, *own):
            collected.append(Fault(name, file, find, replace, own or tests))

        return fault

    return collected, faults
