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

    def shapes(self):
        experts, hidden, width = self.num_experts, self.hidden_size, self.ffn_hidden_size
        return {
            "gate_up_proj": (experts, 2 * width, hidden),
            "down_proj": (experts, hidden, width),
        }

    def views(self):
        gate, up = self.gate_up_proj.chunk(2, dim=1)
        return {"mlp.w1": gate, "mlp.v1": up, "mlp.w2": self.down_proj.mT}


REPLACEMENTS = {DbrxExperts: lambda module: Experts}
