"""DBRX: megablocks' flat experts, whose down matrices are (in, out)."""

from transformers.models.dbrx.modeling_dbrx import DbrxExperts

from ..experts import experts_forward
from .base import Stacked


class Experts(Stacked, DbrxExperts):
    @property
    def act_fn(self):
        return self._originals["mlp"].activation_fn

    def forward(self, hidden_states, top_k_index, top_k_weights):
        tokens = hidden_states.reshape(-1, self.hidden_size)
        return experts_forward(self, tokens, top_k_index, top_k_weights).view(hidden_states.shape)

    @classmethod
    def shapes(cls, original):
        experts, hidden = original.num_experts, original.hidden_size
        width = original.ffn_hidden_size
        return {
            "gate_up_proj": (experts, 2 * width, hidden),
            "down_proj": (experts, hidden, width),
        }

    @classmethod
    def views(cls, name, stack):
        if name == "down_proj":
            return {"mlp.w2": stack.mT}
        gate, up = stack.chunk(2, dim=1)
        return {"mlp.w1": gate, "mlp.v1": up}


REPLACEMENTS = {DbrxExperts: lambda module: Experts}
