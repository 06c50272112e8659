"""A Mixture-of-Experts layer for PyTorch.

layer = moe_ext.MoE(512, 1792, num_experts=8, top_k=2)
y = layer(x)  # in place of a feed-forward module
"""

from . import functional, losses, presets, reference, testing
from .checkpoint import checkpoint_policy
from .config import CapacityConfig, ExpertsConfig, LossConfig, MoEConfig, RouterConfig
from .functional import batch_invariant
from .masking import padding
from .moe import MoE
from .parameters import count_parameters, parameter_groups
from .replace import replace_ffn
from .routing import Routing
from .training import set_loss_scale, update_router_biases, update_router_biases_on_step
from .types import Activation, ExpertParameters, Plan, RouterOutput

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "CapacityConfig",
    "ExpertParameters",
    "ExpertsConfig",
    "LossConfig",
    "MoE",
    "MoEConfig",
    "Plan",
    "RouterConfig",
    "RouterOutput",
    "Routing",
    "batch_invariant",
    "checkpoint_policy",
    "count_parameters",
    "functional",
    "losses",
    "padding",
    "parameter_groups",
    "presets",
    "reference",
    "replace_ffn",
    "set_loss_scale",
    "testing",
    "update_router_biases",
    "update_router_biases_on_step",
]
