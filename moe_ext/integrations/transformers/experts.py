"""The experts function of transformers' registry.

transformers keeps the experts of a layer in one module, decorated with
`use_experts_implementation`; its forward calls the function that the model's config names.
What the experts compute is in the module's flags and its `_apply_gate`.
"""

from typing import Any

from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ...functional import capacity_scatter, grouped_ffn, moe_forward, weighted_combine
from ...reference import accumulation_dtype
from ...types import ExpertParameters
from . import quantised
from .called_gate import called_ffn
from .gates import fused_activation
from .lora import install, low_rank_of
from .observing import observe


def register() -> None:
    """Makes `experts_implementation="moe_ext"` a choice for transformers' models.

        register()
        model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_ext")
        model.set_experts_implementation("moe_ext")         # or on a model that is loaded

    For every model whose experts go through transformers' registry. No weight is touched
    and no class of transformers patched, but that quantised experts, which do not run here,
    say so (quantised.py); of PEFT, where it is installed, one method, so that LoRA on such
    experts keeps no merged copy of them (lora.py). A second call changes nothing.
    """
    ALL_EXPERTS_FUNCTIONS.register("moe_ext", experts_forward)
    install()
    quantised.install()


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """y[t] = sum_j top_k_weights[t, j] * FFN_e(hidden_states[t]), e = top_k_index[t, j].

    Dropless. Experts whose gate is known run fused, with LoRA adapters or without; others have
    their own `_apply_gate` or `act_fn` called on the rows in expert order, with the same results.

    Args:
        self: a module that transformers' `use_experts_implementation` decorates.
        hidden_states: (T, H), of the experts' dtype or not: it is converted.
        top_k_index: (T, K) int32 or int64. Ids >= self.num_experts are expert
            parallelism's sentinels: no work, no gradient, whatever their weights.
        top_k_weights: (T, K), any floating dtype.

    Returns:
        (T, H) in hidden_states' dtype.

    Differentiable in hidden_states, top_k_weights and the module's parameters.
    """
    up, up_bias, down, down_bias = parameters_of(self)
    factors = [low_rank_of(self, name) or (None, None) for name in matrices_of(self)]
    parameters = ExpertParameters(up, down, up_bias, down_bias, *factors[0], *factors[1])
    x = hidden_states.to(up.dtype)
    weights = top_k_weights.to(accumulation_dtype(x.dtype))
    plan = capacity_scatter(top_k_index, self.num_experts)
    observe(self, top_k_index, top_k_weights)
    activation = fused_activation(self, x.dtype)
    has_norm = getattr(self, "has_post_expert_norm", False)  # since transformers 5.19 or later
    is_combined = activation is not None and not has_norm
    if activation is None:
        y = called_ffn(self, x, plan, *parameters)
    elif is_combined:
        y = moe_forward(x, weights, plan, *parameters, activation=activation)
    else:
        y = grouped_ffn(x, plan, *parameters, activation=activation)
    if not is_combined:
        rows = self.post_expert_norm(y) if has_norm else y
        y = weighted_combine(rows, weights.to(accumulation_dtype(rows.dtype)), plan)
    return y.to(hidden_states.dtype)


def matrices_of(experts):
    """The names of a decorated module's matrices."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def parameters_of(experts):
    """(up, up_bias, down, down_bias) of a decorated module; biases None where it has none."""
    return tuple(
        getattr(experts, name) if experts.has_bias or not name.endswith("_bias") else None
        for matrix in matrices_of(experts)
        for name in (matrix, f"{matrix}_bias")
    )
