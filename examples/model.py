"""A small byte-level transformer whose feed-forward part is dense or a Mixture of Experts.

Pre-norm blocks (RMSNorm), causal attention with rotary positions, SwiGLU. The
dense and the MoE model differ in one line: what `Transformer` is given as
`make_ffn`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import moe_ext

VOCABULARY = 256  # a token is a byte


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense feed-forward, and the shape of every expert."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Causal self-attention with rotary positions; normalised queries and keys bear high rates."""

    def __init__(self, hidden_size, heads, context):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        head_size = hidden_size // heads
        self.query_norm = nn.RMSNorm(head_size)
        self.key_norm = nn.RMSNorm(head_size)
        frequency = 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)
        angle = torch.outer(torch.arange(context), frequency).repeat(1, 2)  # (context, head_size)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, x):
        length = x.shape[-2]
        first, second = x.chunk(2, -1)
        return x * self.cos[:length] + torch.cat((-second, first), -1) * self.sin[:length]

    def forward(self, x):
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, length, head_size)
        query, key = self.rotate(self.query_norm(query)), self.rotate(self.key_norm(key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, hidden_size, heads, context, ffn):
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size)
        self.attention = Attention(hidden_size, heads, context)
        self.ffn_norm = nn.RMSNorm(hidden_size)
        self.ffn = ffn

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """bytes (B, length) -> logits (B, length, 256).

    `make_ffn()` builds the feed-forward of one block: any module that maps
    (..., hidden_size) to the same shape.
    """

    def __init__(self, hidden_size, layers, heads, context, make_ffn):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, heads, context, make_ffn()) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(hidden_size)
        self.head = nn.Linear(hidden_size, VOCABULARY, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std=0.02):
        """N(0, std); what writes into the residual stream gets std / sqrt(2 * layers) (GPT-2).

        Experts are drawn exactly as the dense feed-forward is, so that neither
        model starts with an advantage.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # the norms start at 1, a selection bias at 0
            residual = "o_proj" in name or "down_proj" in name
            parameter.normal_(0.0, std / math.sqrt(2 * len(self.blocks)) if residual else std)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def moe_layers(self):
        return [m for m in self.modules() if isinstance(m, moe_ext.MoE)]

    def parameters_total_and_active(self):
        """All parameters, and those that one token passes through: K of E routed experts."""
        total = sum(p.numel() for p in self.parameters())
        idle = sum(
            sum(p.numel() for p in layer.experts.parameters())
            * (1 - layer.top_k / layer.num_experts)
            for layer in self.moe_layers()
        )
        return total, total - round(idle)

    @torch.no_grad()
    def generate(self, prompt, length, temperature=0.8, seed=0):
        """`length` more bytes after `prompt` (bytes), sampled one by one."""
        was_training = self.training
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor([list(prompt)])
        for _ in range(length):
            logits = self(tokens[:, -self.context :])[0, -1]
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, chosen[None]), 1)
        self.train(was_training)
        return bytes(tokens[0].tolist())
