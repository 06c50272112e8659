"""Which gates of transformers' experts the fused kernels compute.

A gate is known by what it is, never by a shape or a name: an activation by its class or
function, an `_apply_gate` by its source, of which a fingerprint stands here. One that differs
from all of them, if only by a constant, is unknown and gets called.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import activations

from ...reference import GATES
from ...types import Activation

# By class, or by function where act_fn is one.
ACTIVATIONS = {
    activations.SiLUActivation: "silu",
    torch.nn.SiLU: "silu",
    F.silu: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    torch.nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
}
GATED = {activation: gated for gated, activation in GATES.items()}


class Gate(NamedTuple):
    """How `functional.moe_forward` is told to compute an `_apply_gate`."""

    activation: str | None = None  # None: that of act_fn
    limit: str | None = None  # the experts' attribute that holds it; None: not clamped
    alpha: str | None = None  # the same; None: 1
    up_offset: float = 0.0
    interleaved: bool = False
    in_float32: bool = False  # whatever the model's dtype, so not for float64


# By the fingerprint of `_apply_gate`; which models have it in transformers 5.24.
GATES_OF_TRANSFORMERS = {
    "a0cdc9b85ceaf0cf": Gate(),  # the decorator's default
    "215319595e48dda1": Gate(in_float32=True),  # beam
    "f40d55cf51496849": Gate(limit="limit"),  # deepseek_v4
    "11ddbf6b28be8aec": Gate("swiglu", limit="swiglu_limit"),  # glm5_next, hy_v4, hy_v4_vl
    "c8648a009a61ce3c": Gate("swiglu", "swiglu_limit", "swiglu_alpha", 1.0),  # minimax_m3_vl
    "c67222ebfdcf6a4d": Gate("swiglu", "limit", "alpha", 1.0),  # openai_privacy_filter
    "63686633f3cb5d4a": Gate("swiglu", "limit", "alpha", 1.0, interleaved=True),  # gpt_oss
}


@functools.cache
def fingerprint(function):
    """Of a function's source, its name, comments and layout left out; None if it has none."""
    if inspect.unwrap(function) is not function:  # the source is then what was wrapped
        return None
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(definition, ast.FunctionDef):
        return None
    definition.name = "_apply_gate"
    definition.returns = None
    for argument in definition.args.args:
        argument.annotation = None
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    return hashlib.sha256(ast.unparse(definition).encode()).hexdigest()[:16]


def fused_activation(experts, dtype):
    """What `functional.moe_forward` computes these experts with in that dtype, or None."""
    if not experts.has_gate:
        activation = activation_of(experts)
        return activation and Activation(activation, transposed=experts.is_transposed)
    gate = None if "_apply_gate" in vars(experts) else gate_of(type(experts))
    if (
        gate is None
        or gate.interleaved == experts.is_concatenated
        or (gate.in_float32 and dtype == torch.float64)
    ):
        return None
    activation = gate.activation or GATED.get(activation_of(experts))
    return activation and Activation(
        activation,
        limit=gate.limit and getattr(experts, gate.limit),
        alpha=getattr(experts, gate.alpha) if gate.alpha else 1.0,
        up_offset=gate.up_offset,
        transposed=experts.is_transposed,
        interleaved=gate.interleaved,
    )


def activation_of(experts):
    act_fn = experts.act_fn
    if inspect.isroutine(act_fn):
        return ACTIVATIONS.get(act_fn)
    is_watched = act_fn._forward_hooks or act_fn._forward_pre_hooks or act_fn._backward_hooks
    return None if is_watched else ACTIVATIONS.get(type(act_fn))


@torch.compiler.assume_constant_result
def gate_of(experts_class):
    """The known gate that the class's `_apply_gate` is, or None."""
    return GATES_OF_TRANSFORMERS.get(fingerprint(experts_class._apply_gate))
