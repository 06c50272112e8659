"""Checks of the arguments that the C++ operators never see.

A wrong type is a TypeError, a wrong value a ValueError, and both say the name,
what was expected and what came:

    MoE: top_k must be an integer from 1 to 8, got 9
"""

import math
import numbers
import operator


def describe(value):
    """`float32 (4, 2)` for a tensor, else the value or the name of its type."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, (str, bytes, numbers.Number, type(None))):
        return repr(value)
    return type(value).__name__


def check_integer(op, name, value, minimum=1, maximum=None):
    """The value as an int."""
    if maximum is None:
        expected = f"an integer of at least {minimum}"
    else:
        expected = f"an integer from {minimum} to {maximum}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        message = f"{op}: {name} must be {expected}, got {describe(value)}"
        raise TypeError(message) from None
    if number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{op}: {name} must be {expected}, got {number}")
    return number


def check_number(op, name, value, minimum=0.0, below=math.inf, positive=False):
    """The value as a finite float, at least `minimum` and below `below`."""
    expected = "a positive number" if positive else f"a number of at least {minimum:g}"
    if minimum == -math.inf:
        expected = "a finite number"
    if below < math.inf:
        expected += f" and below {below:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be {expected}, got {describe(value)}")
    number = float(value)
    # Written so that NaN fails.
    if not (minimum <= number < below) or number == -math.inf or (positive and number <= 0):
        raise ValueError(f"{op}: {name} must be {expected}, got {value!r}")
    return number


def check_name(op, name, value, known):
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be one of {', '.join(known)}, got {describe(value)}")
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")
    return value


def check_flag(op, name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {describe(value)}")
    return value
