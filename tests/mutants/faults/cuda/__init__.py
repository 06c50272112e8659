"""The faults of the CUDA kernels; the emulated suite must catch each of them.

A fault that only some schedules show names `--emulator-seeds` among its tests. One that no
schedule shows is CHECKED: the emulator makes a warp's lanes wait for each other wherever they
exchange something, and sees memory as it was last written; a GPU promises neither. The
checked build knows what was promised.

Every barrier, fence and wait of the kernels has its fault.
"""

from . import combine, experts, hopper, router, scatter

FAULTS = [*router.FAULTS, *scatter.FAULTS, *experts.FAULTS, *hopper.FAULTS, *combine.FAULTS]
