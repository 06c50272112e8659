"""NLLB-MoE, with what transformers makes of its routing.

The router says which expert comes first for a token, as a mask of zeros and ones, and how
much each of its two experts counts. transformers takes that mask for the experts' ids: expert
1 computes every token's first choice and expert 0 its second, and the others never run. A
replacement has the same outputs; it says so once.
"""

import warnings

import torch
import torch.nn.functional as F
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from ..experts import experts_forward
from .base import PerExpert


class Experts(PerExpert, NllbMoeExperts):
    forward_arguments = ("self", "hidden_states", "router_mask", "router_probs")
    has_bias = True
    names = {
        "up_proj": "fc1.weight",
        "up_proj_bias": "fc1.bias",
        "down_proj": "fc2.weight",
        "down_proj_bias": "fc2.bias",
    }

    def adopt(self):
        super().adopt()
        warnings.warn(
            "replace: transformers runs only the experts 0 and 1 of NLLB-MoE, because it takes the"
            " router's mask for expert ids; the outputs are kept as they are",
            stacklevel=4,
        )

    def forward(self, hidden_states, router_mask, router_probs):
        """router_mask (T, E): 1 at a token's first choice, unless dropped; router_probs (T, E)."""
        first = router_mask.sum(-1, keepdim=True)
        experts = torch.cat((torch.where(first > 0, 1, self.num_experts), 0 * first), -1)
        masks = torch.stack((router_mask, 1 - router_mask), 1)
        weights = (router_probs[:, None] * masks).sum(-1)
        p = self.moe_token_dropout
        if not self.training or p == 0:
            return experts_forward(self, hidden_states, experts, weights * (1 - p))
        # Of each expert's output by itself.
        outputs = (
            F.dropout(experts_forward(self, hidden_states, experts[:, [j]], weights[:, [j]]), p)
            for j in range(2)
        )
        return sum(outputs)


REPLACEMENTS = {NllbMoeExperts: lambda module: Experts}
