"""Which gates of transformers' experts the fused kernels compute.

A gate is known by what it is, never by a shape or a name: an activation by its class or
function, an `_apply_gate` by its code. The functions below are transformers' own, word for
word; one that differs from all of them, if only by a constant, is unknown and gets called.
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import activations
from transformers.integrations.moe import _default_apply_gate

from ...reference import GATES

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


_known = {}


def _code(function):
    code = function.__code__
    return code.co_code, code.co_consts, code.co_names


def known(**gate):
    def register(function):
        _known[_code(function)] = Gate(**gate)
        return function

    return register


known()(_default_apply_gate)


@known(activation="swiglu", limit="limit", alpha="alpha", up_offset=1.0, interleaved=True)
def gpt_oss(self, gate_up):
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    glu = gate * torch.sigmoid(gate * self.alpha)
    gated_output = (up + 1) * glu
    return gated_output


@known(activation="swiglu", limit="limit", alpha="alpha", up_offset=1.0)
def openai_privacy_filter(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    glu = gate * torch.sigmoid(gate * self.alpha)
    gated_output = (up + 1) * glu
    return gated_output


@known(activation="swiglu", limit="swiglu_limit", alpha="swiglu_alpha", up_offset=1.0)
def minimax_m3_vl(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.swiglu_limit)
    up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
    glu = gate * torch.sigmoid(gate * self.swiglu_alpha)
    return (up + 1.0) * glu


@known(activation="swiglu", limit="swiglu_limit")
def glm5_next(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(min=None, max=self.swiglu_limit)
    up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
    return F.silu(gate) * up


@known(limit="limit")
def deepseek_v4(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) * up


@known(in_float32=True)
def beam(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return (self.act_fn(gate.float()) * up.float()).to(gate.dtype)


def fused_options(experts, dtype):
    """What `functional.moe_forward` computes these experts with in that dtype, or None."""
    if not experts.has_gate:
        activation = activation_of(experts)
        return activation and dict(activation=activation, transposed=experts.is_transposed)
    gate = None if "_apply_gate" in vars(experts) else gate_of(type(experts))
    if (
        gate is None
        or gate.interleaved == experts.is_concatenated
        or (gate.in_float32 and dtype == torch.float64)
    ):
        return None
    activation = gate.activation or GATED.get(activation_of(experts))
    return activation and dict(
        activation=activation,
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
    return _known.get(_code(experts_class._apply_gate))
