"""JetMoe's feed-forward mixture; its mixture of attention heads stays as it is."""

import torch
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE, JetMoeTopKGating

from ..experts import experts_forward
from .base import Replacement


class Gating(JetMoeTopKGating):
    """The same choice, without the sorting of tokens that the experts do for themselves."""

    def forward(self, hidden_states):
        logits = self.layer(hidden_states).float()
        top_k_logits, top_k_index = logits.topk(self.top_k, dim=1)
        weights = torch.softmax(top_k_logits, dim=1).type_as(hidden_states)
        return top_k_index, weights, None, None, logits  # the logits where they are recorded


class MoE(Replacement, JetMoeMoE):
    forward_arguments = ("self", "layer_input")
    num_experts = property(lambda self: self.router.num_experts)
    gate_up_proj = property(lambda self: self.input_linear.weight)
    down_proj = property(lambda self: self.output_linear.weight)
    act_fn = property(lambda self: self.activation)

    def adopt(self):
        self.router.__class__ = Gating

    def release(self):
        self.router.__class__ = JetMoeTopKGating

    def forward(self, layer_input):
        tokens = layer_input.reshape(-1, self.input_size)
        top_k_index, weights, *_ = self.router(tokens)
        y = experts_forward(self, tokens, top_k_index, weights) + self.bias
        return y.view(layer_input.shape)


REPLACEMENTS = {JetMoeMoE: lambda module: MoE}
