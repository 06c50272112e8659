"""A layer out of other weights, and its weights for others: dense FFNs, published checkpoints."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from . import pretrained, upcycling
from .config import MoEConfig
from .types import Device


class Convertible:
    """The methods of `MoE` that read and write weights of other kinds."""

    @classmethod
    def from_dense(
        cls,
        ffn: nn.Module,
        num_experts: int | MoEConfig = 8,
        top_k: int | None = None,
        **options: Any,
    ) -> Self:
        """An upcycled layer: every expert a copy of a dense FFN, the router fresh.

        Dropless and with weights that sum to 1, K equal experts add up to the one they
        were copied from, so the layer gives the dense layer's output at the start
        (Komatsuzaki et al. 2022). Shared experts, if any, start with a down_proj of 0.

        With top_k=1 such a weight would be 1 for ever, and the router could not learn. So it
        is the score itself (norm_topk_prob=False), scaled to 1 where all scores are equal,
        and the router starts that close to it (logits of 1e-5; in half precision a 16th
        of the dtype's eps). norm_topk_prob=True keeps the weight at 1.

        Args:
            ffn: Two linear maps with an activation between them, or three with a gate (or gate
                and up in one), under any names: what it computes is found by trying it on a few
                tokens, with other parameters and without its hooks. Left as it is.
            num_experts: E; or the `MoEConfig` of such a layer.
            top_k: K.
            **options: Of `MoE`; capacity_factor is None (dropless) unless given; device, dtype,
                biases and mode are the FFN's, and copies of a frozen matrix are frozen. The
                activation, where it is given, is not looked for.

        Raises:
            TypeError, ValueError: ffn is no such module, or on the meta device; the
                options do not make a token's weights sum to 1; or one of gate and up,
                which become one parameter, is frozen.
        """
        return upcycling.upcycle(cls, ffn, num_experts, top_k, **options)

    @classmethod
    def from_pretrained_block(
        cls, path_or_state_dict: str | os.PathLike | Mapping[str, Tensor],
        layer: int | str | None = None, *, preset: str | MoEConfig | Mapping[str, Any] | None = None,
        device: Device = None, dtype: torch.dtype | None = None, **options: Any,
    ) -> Self:  # fmt: skip
        """The MoE block of one layer of a published system's checkpoint.

            moe = MoE.from_pretrained_block("Mixtral-8x7B-v0.1/", layer=3, preset="mixtral_8x7b")

        What is in the checkpoint is known by its names alone (see `pretrained.FORMATS`):
        Mixtral, DeepSeek-V2 and V3, Grok-1, Switch Transformers, megablocks' dMoE, one
        tensor an expert or all in one. Quantised tensors (Grok-1's int8, DeepSeek-V3's
        float8) are multiplied with the scales beside them.

        Args:
            path_or_state_dict: A safetensors file, a folder of them with their index, or a
                dict of tensors. Only what is needed is read.
            layer: The layer's number; or what stands before the block's names
                ("decoder.block.1.layer.2.mlp"); or None where nothing does.
            preset: A name in `presets.PRESETS`, a `MoEConfig`, a dict of options, or None.
            device: None: the CPU.
            dtype: None: the checkpoint's, which the router may have for itself (bfloat16 for a
                quantised one).
            **options: Of `MoE`, in place of the preset's.

        Raises:
            TypeError, ValueError: an unknown preset, no block there, or tensors that are
                missing, left over, or of another shape than the arguments make.
        """
        return pretrained.from_pretrained_block(
            cls, path_or_state_dict, layer, preset=preset, device=device, dtype=dtype, **options
        )

    def export_state_dict(
        self, format: str = "transformers", layer: int | str | None = None
    ) -> dict[str, Tensor]:
        """The parameters under the names of a published system, {name: tensor}.

        What `from_pretrained_block` reads, bit for bit, and what serving engines do: one
        tensor an expert in "mixtral", "deepseek", "grok_per_expert" and "switch"; all in
        one in "transformers", "grok" and "megablocks". Tensors may share the memory of
        the parameters, as those of `state_dict()` do; safetensors saves them.

        Args:
            format: A name in `pretrained.FORMATS`.
            layer: A number or a prefix, as in `from_pretrained_block`; None: bare names.

        Raises:
            ValueError: an unknown format, or one without a name for a part of this layer.
        """
        return pretrained.export_state_dict(self, format, layer)
