"""LongCat-Flash: the experts of the highest ids are the identity."""

from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from ..experts import experts_forward
from .base import Replacement


class Experts(Replacement, LongcatFlashExperts):
    num_experts = property(lambda self: self.num_routed_experts)
    # Theirs has rows for the identity experts too, which nothing reads.
    gate_up_proj = property(lambda self: self._parameters["gate_up_proj"][: self.num_experts])

    def forward(self, hidden_states, top_k_index, top_k_weights):
        routed = experts_forward(self, hidden_states, top_k_index, top_k_weights)
        identity = top_k_weights.masked_fill(top_k_index < self.num_experts, 0).sum(-1, True)
        return routed + (hidden_states * identity).to(routed.dtype)


REPLACEMENTS = {LongcatFlashExperts: lambda module: Experts}
