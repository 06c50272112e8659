"""The layer: a token's way through the stages."""

import itertools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from . import inference, losses
from ._checks import check_dtype, check_flag, check_mask, check_routing, check_tokens
from ._compat import is_exporting
from ._masks import current_padding
from .config import MoEConfig
from .conversions import Convertible
from .experts import Experts, SharedExperts
from .functional import capacity_scatter
from .options import config_of, described, with_options
from .routing import Router, Routing, Settings, renormalize_after_drop
from .stats import Numbers, RoutingStats, counting, home
from .types import Device

__all__ = ["MoE"]


@with_options
class MoE(Convertible, nn.Module):
    """A Mixture of Experts in place of a feed-forward network.

        logits = x W_gate^T                          (T, E), accumulated in float32
        experts, weights = the top_k best of each token's scores
        y_t = sum_j weights[t, j] * FFN_experts[t, j](x_t)  +  shared experts(x_t)

    x is (..., hidden_size), in the dtype of the parameters (any under autocast); one
    dimension is one token; y has its shape and dtype. T is the number of
    tokens in x, E = num_experts, K = top_k, H = hidden_size, I = intermediate_size.

        layer = moe_ext.MoE(512, 1792, num_experts=8, top_k=2)
        y = layer(x)
        y, routing = layer(x, padding_mask=mask, return_routing=True)
        y = layer(x, routing=routing)

    `layer.config` holds every option, and each is an attribute too. Those that no parameter
    depends on may be set at any time, `layer.capacity_factor = 2.0`, or several at once,
    `layer.config = layer.config.replace(top_k=1, aux_loss_coef=0.0)`: from the next forward on
    they govern all that they do at construction.

    Args:
        hidden_size: H; or a `MoEConfig` in the place of all options.
        intermediate_size: I of each expert.
        num_experts: E.
        top_k: K, experts a token takes; 2 unless given. Also `num_experts_per_tok`.
        device: Of the parameters.
        dtype: Of the parameters: float64, float32, bfloat16 or float16.
        **options: Those of `RouterConfig`, `ExpertsConfig` and its `Activation`,
            `CapacityConfig` and `LossConfig`, side by side, and `init_std`.

    Differentiable in x and all parameters; the choice and the drops are constants.
    A second derivative, forward-mode AD and the transforms of torch.func raise
    RuntimeError. The same inputs give the same bits, forward and backward, whatever
    the number of threads (of shared experts, which are nn.Linear, as far as those do);
    see `batch_invariant` for other batches.

    Parameters have the names of Hugging Face's MoE blocks (gate.weight,
    experts.gate_up_proj, experts.down_proj, shared_experts.gate_proj.weight ...), so
    the state_dict of such a block loads as it is.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    config: MoEConfig  # and each option in it as an attribute, see options.py

    def __init__(
        self, hidden_size: int | MoEConfig, intermediate_size: int | None = None,
        num_experts: int = 8, top_k: int | None = None, *, device: Device = None,
        dtype: torch.dtype | None = None, **options: Any,
    ):  # fmt: skip
        super().__init__()
        config = config_of(hidden_size, intermediate_size, num_experts, top_k, options)
        check_dtype("MoE", "dtype", dtype)
        router, experts = config.router, config.experts
        if router.weighs_one:
            warnings.warn(
                "MoE: a single weight that is normalised is always 1, so that with top_k=1 nothing"
                " but the losses trains the router; norm_topk_prob=False (with score_function"
                " softmax or sigmoid) takes the score as the weight",
                stacklevel=2,
            )
        self._settings = Settings(config)
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        ffn = dict(
            activation=experts.activation, bias=experts.bias, init_std=config.init_std, **place
        )
        size, shared = config.hidden_size, experts.shared_expert_intermediate_size
        self.gate = Router(self._settings, **place)
        self.experts = Experts(size, config.intermediate_size, router.num_experts, **ffn)
        self.shared_experts = SharedExperts(size, shared, **ffn) if shared else None
        self.shared_expert_gate = None
        if experts.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(size, 1, False, **place)
            nn.init.normal_(self.shared_expert_gate.weight, std=config.init_std)

        # Plain tensors, outside of the state_dict; `_move_state` has them follow the tokens.
        device = self.gate.weight.device
        self._stats = RoutingStats(router.num_experts, router.bias_update_rate > 0, device)
        # Others that count along, each (in training, in evaluation), read and reset by their owner.
        self._routing_watchers: list[tuple[RoutingStats, RoutingStats]] = []
        self.loss_scale = torch.ones((), dtype=torch.float64, device=home(device))
        self._loss_scale_is_set = False
        self._step_seen = None  # see losses.warn_unscaled

    # ---- the way of a token ------------------------------------------------------

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, routing: Routing | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:  # fmt: skip
        """The layer's output, in x's shape and dtype.

        Args:
            x: (..., H).
            padding_mask: bool, x.shape[:-1], True is padding. Padding takes no capacity,
                counts in no loss and no statistic, its output is 0 and so is its gradient,
                whatever it holds, NaN too. None: that of a surrounding `padding`.
            routing: A recorded `Routing`: its experts and its plan are taken again, the
                weights come from the current logits, with gradient.
            return_routing: Return (y, `Routing`).
        """
        config = self.config
        check_tokens(x, config.hidden_size)
        padding_mask = self._padding_of(x, padding_mask)
        if routing is None and not return_routing:
            operands = inference.operands(self, x)
            if operands is not None:
                y = inference.moe_infer(self, operands, x, padding_mask)
                return self._with_shared(y, x, padding_mask)
        tokens = x.reshape(-1, config.hidden_size)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
            # It may hold anything, and a gradient of 0 times NaN is NaN.
            tokens = tokens.masked_fill(padding_mask[:, None], 0)

        router_tokens, router = tokens, config.router
        if self.training and router.jitter_eps > 0:
            eps = router.jitter_eps
            router_tokens = tokens * torch.empty_like(tokens).uniform_(1 - eps, 1 + eps)
            if router.jitter_target == "block":
                tokens = router_tokens

        plan = recorded = None
        if routing is not None:
            check_routing(routing, tokens.shape[0], router.top_k, router.num_experts)
            recorded, plan = routing.experts, routing.plan
        logits, route = self.gate(router_tokens, padding_mask, recorded)
        if plan is None:
            plan = self._plan(x.shape, route, padding_mask)

        if self._stats.counts.device != logits.device:
            self._move_state(logits.device)
        weights, aux_loss, z_loss = losses.of_forward(self, x, route, padding_mask, return_routing)
        if config.capacity.renormalize_after_drop:
            weights = renormalize_after_drop(weights, plan.assignment_row)
        if weights.dtype == torch.float64 and tokens.dtype != torch.float64:
            weights = weights.float()  # of a float64 router

        # Before the experts, whose weights push the routing out of the caches. An exported program
        # has no place for a tensor that is not a buffer and changes; meta tensors say nothing.
        if not (is_exporting() or logits.is_meta):
            for stats in (self._stats, *counting(self._routing_watchers, self.training)):
                stats.accumulate(
                    logits, route, plan.assignment_row, padding_mask, router.score_function,
                    self.training,
                )  # fmt: skip
        y = self._with_shared(self.experts(tokens, weights, plan), tokens, padding_mask)
        y = y.view(x.shape)
        if not return_routing:
            return y
        return y, Routing(logits, weights, route.experts, plan, aux_loss, z_loss)

    def _padding_of(self, x, mask):
        """The mask of this call: its own, else the surrounding `padding` context's."""
        if mask is not None:
            check_mask("MoE", "padding_mask", mask, x.shape[:-1])
            return mask
        mask = current_padding(self)
        if mask is not None and not (x.dim() == 2 and mask.numel() == x.shape[0]):
            check_mask("MoE", "the mask of moe_ext.padding", mask, x.shape[:-1])
        return mask

    def _plan(self, shape, route, padding_mask):
        config = self.config
        capacity, num_sequences = config.room(shape, self.training)
        drop_policy = config.capacity.drop_policy
        return capacity_scatter(
            route.experts, config.router.num_experts, capacity,
            weights=route.weights.detach() if drop_policy == "probs" else None,
            padding_mask=padding_mask, drop_policy=drop_policy, num_sequences=num_sequences,
        )  # fmt: skip

    def capacity(self, tokens: int) -> int | None:
        """C, the most rows of one expert, for so many tokens in the mode that the layer is in.

        min(max(ceil(factor * tokens * top_k / num_experts), min_capacity), tokens), or
        None where the layer is dropless.
        """
        return self.config.rows_per_expert(tokens, self.training)

    def _with_shared(self, y, x, padding_mask):
        """The routed experts' y and the shared ones', added, in x's shape and dtype."""
        if self.shared_experts is not None:
            y = y + self._shared(x.reshape(-1, self.hidden_size), padding_mask).view(x.shape)
        if y.dtype != x.dtype:  # autocast's
            y = y.to(x.dtype)
        return y

    def _shared(self, tokens, padding_mask):
        shared = self.shared_experts(tokens)
        if self.shared_expert_gate is not None:
            shared = torch.sigmoid(self.shared_expert_gate(tokens)) * shared
        if padding_mask is not None:
            shared = shared.masked_fill(padding_mask.reshape(-1, 1), 0)
        return shared

    # ---- statistics and state ----------------------------------------------------

    def stats(self, reset: bool = False) -> Numbers:
        """What the routing did since the last reset, as a dict of floats for any logger.

        - drop_rate: share of assignments beyond capacity
        - lost_rate: share of tokens whose assignments were all dropped
        - entropy: of the mean score distribution, over log E; a collapse takes it to 0
        - token_entropy: mean entropy of the tokens' own distributions, over log E
        - max_violation: MaxVio, the largest load over the mean load, minus 1
        - dead_experts: experts without an assignment
        - max_logit: the largest router logit
        - tokens, forwards: how many were seen, in training and eval, without padding

        0.0 where nothing was seen. The dict's attribute `load`, (E) float64 on the CPU, has
        the assignments of each expert before any drop. One transfer from the device a
        call; under data parallelism, of this process alone.

        Args:
            reset: start again from zero after reading.
        """
        return self._stats.read(check_flag("MoE.stats", "reset", reset))

    def reset_parameters(self) -> None:
        """Parameters as at construction, statistics and selection bias at zero; also after to_empty()."""
        for module in (self.gate, self.experts, self.shared_experts):
            if module is not None:
                module.reset_parameters()
        if self.shared_expert_gate is not None:
            nn.init.normal_(self.shared_expert_gate.weight, std=self.config.init_std)
        self._stats.zero_()
        self.loss_scale.fill_(1.0)
        self._loss_scale_is_set = False
        self._step_seen = None  # see losses.warn_unscaled

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._move_state(next(self.parameters()).device)
        return self

    def _move_state(self, device):
        """Statistics and loss scale to a device, but never to meta."""
        if device.type != "meta":
            for stats in (self._stats, *itertools.chain(*self._routing_watchers)):
                stats.to(device)
            self.loss_scale = self.loss_scale.to(device)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Qwen2-MoE says shared_expert where DeepSeek says shared_experts.
        theirs, ours = f"{prefix}shared_expert.", f"{prefix}shared_experts."
        for name in [n for n in state_dict if n.startswith(theirs)]:
            renamed = ours + name.removeprefix(theirs)
            if renamed not in state_dict:  # else one too many, which a strict load reports
                state_dict[renamed] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return described(self.config)
