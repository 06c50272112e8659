"""Checks of the arguments that the C++ operators never see.

A wrong type is a TypeError, a wrong value a ValueError, and both say the name,
what was expected and what came:

    MoE: top_k must be an integer from 1 to 8, got 9
"""

import math
import numbers
import operator

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCORE_FUNCTIONS = ("softmax", "sigmoid", "softmax_topk")
DROP_POLICIES = ("token", "choice", "probs")


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


def check_dtype(op, name, value):
    """None or one of the four floating dtypes."""
    if value is not None and value not in FLOATS:
        raise (ValueError if isinstance(value, torch.dtype) else TypeError)(
            f"{op}: {name} must be None, torch.float64, torch.float32, torch.bfloat16"
            f" or torch.float16, got {value!r}"
        )
    return value


# ---- autocast -------------------------------------------------------------------------


def autocast_dtype(device_type):
    """What autocast casts to on such a device, or None; it raises for those it does not know."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


# ---- the arguments of MoE.forward ----------------------------------------------------


def check_tokens(x, hidden_size):
    """x: (..., H), floating and dense; its dtype and device are for those who hold parameters."""
    expected = f"a floating tensor of shape (..., {hidden_size})"
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"MoE: x must be {expected}, got {describe(x)}")
    if x.is_nested or x.layout is not torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(
            f"MoE: x must be {expected}, got a {kind} one: give the values of a nested tensor"
            " (x.values()), or torch.nested.to_padded_tensor(x, 0.0) and a padding_mask"
        )
    if x.dim() < 1 or x.shape[-1] != hidden_size:
        raise ValueError(f"MoE: x must be {expected}, got {describe(x)}")


def check_same_device(x, weight):
    if x.device != weight.device:
        raise ValueError(f"MoE: x must be on the parameters' {weight.device}, got {x.device}")


def check_same_dtype(x, weight):
    """x in the dtype of the parameters, or any floating one under autocast."""
    if x.dtype != weight.dtype and autocast_dtype(x.device.type) is None:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise TypeError(
            f"MoE: x must be {dtype} as the experts' parameters (or under autocast),"
            f" got {describe(x)}"
        )


def check_mask(op, name, mask, shape=None):
    """bool, True is padding; of this shape, or of any where it is None."""
    expected = "bool" if shape is None else f"bool of shape {tuple(shape)}"
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{op}: {name} must be {expected}, got {describe(mask)}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: {name} must be {expected}, True is padding, got {describe(mask)};"
            " from an attention mask take `attention_mask == 0`"
        )
    if shape is not None and mask.shape != shape:
        raise ValueError(f"{op}: {name} must be {expected}, got {describe(mask)}")


def check_routing(routing, tokens, top_k, num_experts):
    """A recorded `Routing` fits a layer and a batch."""
    experts, plan = getattr(routing, "experts", None), getattr(routing, "plan", None)
    if not isinstance(experts, torch.Tensor):
        raise TypeError(
            "MoE: routing must be a moe_ext.Routing, as return_routing=True gives it,"
            f" got {describe(routing)}"
        )
    if experts.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"MoE: routing.experts must be int32 or int64 of shape {(tokens, top_k)},"
            f" got {describe(experts)}"
        )
    if experts.shape != (tokens, top_k):
        raise ValueError(
            f"MoE: routing.experts must be int32 or int64 of shape {(tokens, top_k)},"
            f" got {describe(experts)}"
        )
    if plan is not None and plan.expert_offsets.shape != (num_experts + 1,):
        raise ValueError(
            f"MoE: routing.plan must be of {num_experts} experts, expert_offsets of shape"
            f" {(num_experts + 1,)}, got {describe(plan.expert_offsets)}"
        )
