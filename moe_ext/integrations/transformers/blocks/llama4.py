"""Llama 4: a token's score scales what goes into the expert, not what comes out."""

import torch
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from .base import Replacement


class Experts(Replacement, Llama4TextExperts):  # type: ignore[misc]  # our `MoE` calls its forward
    """Called by `MoE` below, with the registry's arguments."""

    forward_arguments = ("self", "hidden_states")
    is_transposed = True


class MoE(Replacement, Llama4TextMoe):
    computes_experts = False
    forward_arguments = ("self", "hidden_states")

    def forward(self, hidden_states):
        """Each choice is a token of its own, with one expert and a weight of 1."""
        tokens = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(tokens)
        top_k_index = logits.topk(self.top_k, dim=1).indices
        scores = scores.gather(1, top_k_index)
        scaled = (tokens[:, None] * scores[..., None]).flatten(0, 1)
        routed = self.experts(scaled, top_k_index.view(-1, 1), torch.ones_like(scores).view(-1, 1))
        routed = routed.view(*scores.shape, self.hidden_dim).sum(1)
        return self.shared_expert(tokens) + routed, logits


REPLACEMENTS = {Llama4TextExperts: lambda module: Experts, Llama4TextMoe: lambda module: MoE}
