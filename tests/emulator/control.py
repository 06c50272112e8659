"""The emulator's settings, from Python."""

import ctypes
import os

from emulator import build

LATEST, RANDOM, EAGER = range(3)  # when asynchronous work takes effect
BY_SEED = -1
DEVICES = "sm_80", "sm_90", "sm_86"  # what it can pretend to be

_folder = build.folder(os.environ.get("MOE_EXT_EMULATOR_BUILD", "fast"))
_library = ctypes.CDLL(str(_folder / "libemulator.so"))
_library.moe_ext_emulator_set.argtypes = (
    ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_bool,
)  # fmt: skip
_library.moe_ext_emulator_launches.restype = ctypes.c_uint64
_library.moe_ext_emulator_launched.restype = ctypes.c_char_p


def set(seed=0, delivery=BY_SEED, device=0, refuse_maps=False):
    """device: an index of DEVICES. refuse_maps: as a driver that makes no tensor maps. Returns
    the seed."""
    _library.moe_ext_emulator_set(seed, delivery, device, refuse_maps)
    return seed


def launches():
    """How many grids have run."""
    return _library.moe_ext_emulator_launches()


def launched():
    """The names of the grids that have run since `set`, in order."""
    return _library.moe_ext_emulator_launched().decode().splitlines()


def primitives():
    """The micro-kernels of tests/emulator/kernels/."""
    library = ctypes.CDLL(str(_folder / "libprimitives.so"))
    library.micro_error_text.restype = ctypes.c_char_p
    return library
