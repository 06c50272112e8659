"""The experts: their parameters, and the feed-forward network that all tokens share."""

import torch
from torch import nn

from . import functional
from ._checks import check_same_device, check_same_dtype
from .reference import ACTIVATIONS, GATES, gated_activation
from .types import ExpertParameters

__all__ = ["Experts", "SharedExperts"]


class Experts(nn.Module):
    """E feed-forward networks whose parameters lie stacked in one tensor a matrix.

        gated:    down_proj[e] (phi(gate) * up),  [gate; up] = gate_up_proj[e] x
        ungated:  down_proj[e] phi(up_proj[e] x)

    Parameters: `gate_up_proj` (E, 2I, H), or `up_proj` (E, I, H) without a gate;
    `down_proj` (E, H, I); with a bias `gate_up_proj_bias` (E, 2I) or `up_proj_bias`
    (E, I), and `down_proj_bias` (E, H). `activation.transposed` swaps the last two
    dimensions of the matrices; `activation.interleaved` has the rows of gate and up alternate.
    """

    def __init__(
        self, hidden_size, intermediate_size, num_experts, *,
        activation, bias=False, init_std=0.02, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.activation, self.init_std = activation, init_std
        gated = activation.name in GATES
        width = 2 * intermediate_size if gated else intermediate_size
        up, down = (width, hidden_size), (hidden_size, intermediate_size)
        if activation.transposed:
            up, down = up[::-1], down[::-1]

        def parameter(*shape):
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        name = "gate_up_proj" if gated else "up_proj"
        self.up_names = name, f"{name}_bias"
        self.register_parameter(name, parameter(*up))
        self.down_proj = parameter(*down)
        self.register_parameter(f"{name}_bias", parameter(width) if bias else None)
        self.down_proj_bias = parameter(hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        """Matrices from a normal distribution of `init_std`; biases zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.init_std)

    def weights(self):
        """As `functional.moe_forward` takes them."""
        # getattr, not self._parameters: a parametrized weight is a property.
        up, up_bias = self.up_names
        return ExpertParameters(
            getattr(self, up), self.down_proj, getattr(self, up_bias), self.down_proj_bias
        )

    def forward(self, x, weights, plan):
        """x (T, H), weights (T, K) and the plan -> the weighted sum of each token's rows (T, H)."""
        parameters = self.weights()
        check_same_device(x, parameters.up_proj)
        check_same_dtype(x, parameters.up_proj)
        return functional.moe_forward(x, weights, plan, *parameters, activation=self.activation)

    def extra_repr(self):
        up, down, *_ = self.weights()
        shapes = f"{self.up_names[0]}={tuple(up.shape)}, down_proj={tuple(down.shape)}"
        options = {"activation": self.activation.name, **self.activation._asdict()}
        del options["name"]
        flags = [f"{k}={v}" for k, v in options.items() if v not in (None, False)]
        return ", ".join([shapes, *flags])


class SharedExperts(nn.Module):
    """The feed-forward network that every token takes: three matrices, or two without a gate."""

    def __init__(
        self, hidden_size, intermediate_size, *,
        activation, bias=False, init_std=0.02, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.activation, self.init_std = activation, init_std
        kwargs = dict(bias=bias, device=device, dtype=dtype)
        gated = activation.name in GATES
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **kwargs) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **kwargs)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **kwargs)
        self.reset_parameters()

    def reset_parameters(self):
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.init_std)

    def forward(self, x):
        up = self.up_proj(x)
        name, limit, alpha, up_offset, *_ = self.activation
        if self.gate_proj is None:
            return self.down_proj(ACTIVATIONS[name](up))
        gate = self.gate_proj(x)
        if limit is None and alpha == 1.0 and up_offset == 0.0:
            # One fused function of the gate, so one tensor less kept for the backward pass.
            return self.down_proj(ACTIVATIONS[GATES[name]](gate) * up)
        return self.down_proj(gated_activation(gate, up, self.activation))
