"""Switch Transformers: one expert a token, its places counted by the router, sequence by sequence."""

import torch
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

from ..experts import experts_forward
from .base import PerExpert


class Experts(PerExpert, SwitchTransformersExperts):
    forward_arguments = ("self", "hidden_states", "selected_experts", "routing_weights")
    sentinels_are_drops = True
    names = {"up_proj": "wi.weight", "down_proj": "wo.weight"}

    def forward(self, hidden_states, selected_experts, routing_weights):
        """selected_experts (T, 1, E): one-hot, or zero where the token was dropped."""
        chosen = selected_experts.flatten(1)
        dropped = chosen.sum(-1, keepdim=True) == 0
        experts = torch.where(dropped, self.num_experts, chosen.argmax(-1, keepdim=True))
        return experts_forward(self, hidden_states, experts, routing_weights)


REPLACEMENTS = {SwitchTransformersExperts: lambda module: Experts}
