"""The layer: a token's way through the stages."""

import itertools
import math
import warnings

import torch
from torch import nn

from . import inference, losses
from ._checks import (
    check_clamp,
    check_dtype,
    check_flag,
    check_integer,
    check_layout,
    check_mask,
    check_number,
    check_routing,
    check_routing_options,
    check_shared,
    check_tokens,
    one_top_k,
)  # fmt: skip
from ._compat import is_exporting, smaller
from .experts import Experts, SharedExperts
from .functional import capacity_scatter
from .masking import current_padding
from .options import with_options
from .routing import Router, Routing, capacity_of, renormalize_after_drop
from .stats import RoutingStats, counting, home


@with_options
class MoE(nn.Module):
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

    Args:
        hidden_size, intermediate_size: H and each expert's I.
        num_experts: E.
        top_k: K, experts a token takes; 2 unless given. Also `num_experts_per_tok`.

        activation: gated: swiglu, geglu, geglu_tanh, reglu; ungated: silu, gelu,
            gelu_tanh, relu, relu2.
        limit, alpha, up_offset: of the gated activations: the gate is clamped to at
            most limit and up to [-limit, limit]; swiglu's gate is g * sigmoid(alpha g);
            up counts as up + up_offset. (gpt-oss: 7, 1.702, 1.)
        transposed, interleaved: the experts' layout: (E, in, out) instead of
            (E, out, in); gate and up rows alternating instead of [gate; up].
        bias, gate_bias: biases on the experts; on the router.

        score_function: "softmax" over the E logits, "sigmoid", or "softmax_topk",
            softmax over the K chosen logits.
        norm_topk_prob: divide a token's K weights by their sum (not for softmax_topk,
            whose weights sum to 1). With top_k=1 that makes every weight 1: only the losses
            train the router then, and a warning says so.
        routed_scaling_factor: a factor on the weights.
        n_group, topk_group, group_score: the experts form n_group groups of neighbours,
            each scored by its best expert ("max") or the sum of its best two
            ("top2_sum"); only experts of the topk_group best groups are eligible.
        bias_update_rate: above 0: loss-free balancing, see `update_router_biases`.
        score_correction_bias: have `gate.e_score_correction_bias`, a float32 buffer
            that is added to the scores for the choice alone. Implied by a rate above 0.

        capacity_factor: in training an expert takes at most
            C = min(max(ceil(capacity_factor * T * K / E), min_capacity), T) rows;
            a dropped assignment adds 0. None: dropless.
        eval_capacity_factor: the same in eval; None: dropless.
        min_capacity: see C.
        expert_capacity: an absolute C, in training and eval, instead of the factors.
        capacity_scope: "batch", or "sequence": x is (..., S, H), C comes from S, and
            every sequence fills the experts by itself (Switch in `transformers`).
        drop_policy: who stays when an expert is full: "token": tokens in order;
            "choice": all first choices in token order, then all second ones (GShard);
            "probs": the largest weights. "choice" and "probs" let later tokens displace
            earlier ones: with a capacity the future leaks into a causal language model's
            training.
        renormalize_after_drop: scale a token's kept weights up to the sum of all of
            them; 0 where all were dropped.

        aux_loss_coef: coefficient of the balance loss E * sum f_i P_i, 1.0 at perfect
            balance whatever K (Hugging Face's router_aux_loss_coef is this one over K).
        z_loss_coef: coefficient of mean(logsumexp(logits)^2).
        inject_losses: in training, let both losses reach the router on the backward
            path of y, with no change to the training loop, times `loss_scale` (see
            `set_loss_scale`). False: `Routing` returns them attached, without
            their coefficients, for loops that add them.
        jitter_eps: in training, multiply the tokens by uniform(1 - eps, 1 + eps) ...
        jitter_target: ... for the "router" alone, or for the whole "block" (Mixtral).

        shared_expert_intermediate_size: size of a network that every token takes; 0: none.
        shared_expert_gate: a sigmoid gate on its output (Qwen2-MoE).
        router_dtype: cast the router's input and parameters to it first; None: they go
            in as they are, and float32 accumulates (float64 for float64).
        init_std: standard deviation of all matrices at the start; biases are 0.
        device, dtype: of the parameters.

    forward:
        padding_mask: bool, x.shape[:-1], True is padding. Padding takes no capacity,
            counts in no loss and no statistic, its output is 0 and so is its gradient,
            whatever it holds, NaN too. See also `padding`.
        routing: a recorded `Routing`: its experts and its plan are taken again, the
            weights come from the current logits, with gradient.
        return_routing: return (y, Routing).

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

    def __init__(
        self,
        hidden_size,
        intermediate_size,
        num_experts=8,
        top_k=None,
        *,
        num_experts_per_tok=None,
        activation="swiglu",
        limit=None,
        alpha=1.0,
        up_offset=0.0,
        transposed=False,
        interleaved=False,
        bias=False,
        gate_bias=False,
        score_function="softmax",
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
        group_score="max",
        bias_update_rate=0.0,
        score_correction_bias=False,
        capacity_factor=1.25,
        eval_capacity_factor=None,
        min_capacity=4,
        expert_capacity=None,
        capacity_scope="batch",
        drop_policy="token",
        renormalize_after_drop=False,
        aux_loss_coef=0.01,
        z_loss_coef=0.0,
        inject_losses=True,
        jitter_eps=0.0,
        jitter_target="router",
        shared_expert_intermediate_size=0,
        shared_expert_gate=False,
        router_dtype=None,
        init_std=0.02,
        device=None,
        dtype=None,
    ):
        super().__init__()
        size = check_integer("MoE", "hidden_size", hidden_size)
        width = check_integer("MoE", "intermediate_size", intermediate_size)
        num_experts = check_integer("MoE", "num_experts", num_experts)
        ffn = dict(
            activation=activation,
            bias=check_flag("MoE", "bias", bias),
            **check_clamp(activation, limit, alpha, up_offset),
        )
        layout = check_layout(activation, transposed, interleaved)
        shared_size = check_shared(shared_expert_intermediate_size, shared_expert_gate)
        self._routing = check_routing_options(
            num_experts,
            top_k=one_top_k(top_k, num_experts_per_tok),
            score_function=score_function,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=routed_scaling_factor,
            n_group=n_group,
            topk_group=topk_group,
            group_score=group_score,
        )
        if self.top_k == 1 < num_experts and (norm_topk_prob or score_function == "softmax_topk"):
            warnings.warn(
                "MoE: a single weight that is normalised is always 1, so that with top_k=1 nothing"
                " but the losses trains the router; norm_topk_prob=False (with score_function"
                " softmax or sigmoid) takes the score as the weight",
                stacklevel=2,
            )
        balances = check_number("MoE", "bias_update_rate", bias_update_rate) > 0
        router = dict(
            bias=check_flag("MoE", "gate_bias", gate_bias),
            score_correction_bias=(
                check_flag("MoE", "score_correction_bias", score_correction_bias) or balances
            ),
            input_dtype=check_dtype("MoE", "router_dtype", router_dtype),
        )
        init_std = check_number("MoE", "init_std", init_std)
        check_dtype("MoE", "dtype", dtype)
        self._options = dict(
            hidden_size=size,
            intermediate_size=width,
            num_experts=num_experts,
            **ffn,
            **layout,
            gate_bias=gate_bias,
            score_correction_bias=router["score_correction_bias"],
            router_dtype=router_dtype,
            shared_expert_intermediate_size=shared_size,
            shared_expert_gate=shared_expert_gate,
            init_std=init_std,
        )
        self._capacity_ratios = {}
        self.jitter_eps = jitter_eps
        self.jitter_target = jitter_target
        self.min_capacity = min_capacity
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.expert_capacity = expert_capacity
        self.capacity_scope = capacity_scope
        self.drop_policy = drop_policy
        self.renormalize_after_drop = renormalize_after_drop
        self.aux_loss_coef = aux_loss_coef
        self.z_loss_coef = z_loss_coef
        self.inject_losses = inject_losses

        common = dict(init_std=init_std, device=device, dtype=dtype)
        self.gate = Router(size, num_experts, self._routing, **router, **common)
        self.experts = Experts(size, width, num_experts, **ffn, **layout, **common)
        self.shared_experts = self.shared_expert_gate = None
        if shared_size:
            self.shared_experts = SharedExperts(size, shared_size, **ffn, **common)
        if shared_expert_gate:
            self.shared_expert_gate = nn.Linear(size, 1, False, device, dtype)
            nn.init.normal_(self.shared_expert_gate.weight, std=init_std)

        # Plain tensors, outside of the state_dict; `_move_state` has them follow the tokens.
        device = self.gate.weight.device
        self._stats = RoutingStats(num_experts, balances, device)
        # Others that count along, each (in training, in evaluation), read and reset by their owner.
        self._routing_watchers = []
        self.bias_update_rate = bias_update_rate
        self.loss_scale = torch.ones((), dtype=torch.float64, device=home(device))
        self._loss_scale_is_set = False
        self._step_seen = None  # see losses.warn_unscaled

    @classmethod
    def from_dense(cls, ffn, num_experts=8, top_k=None, **options):
        """An upcycled layer: every expert a copy of a dense FFN, the router fresh.

        Dropless and with weights that sum to 1, K equal experts add up to the one they
        were copied from, so the layer gives the dense layer's output at the start
        (Komatsuzaki et al. 2022). Shared experts, if any, start with a down_proj of 0.

        With top_k=1 such a weight would be 1 for ever, and the router could not learn. So it
        is the score itself (norm_topk_prob=False), scaled to 1 where all scores are equal,
        and the router starts that close to it (logits of 1e-5; in half precision a 16th
        of the dtype's eps). norm_topk_prob=True keeps the weight at 1.

        Args:
            ffn: a module of two linear maps with an activation between them, or of three
                with a gate (or gate and up in one), under any names: what it computes is
                found by trying it on a few tokens, with other parameters and without its
                hooks. Left as it is.
            num_experts, top_k, **options: of `MoE`; capacity_factor is None (dropless)
                unless given; device, dtype, biases and mode are the FFN's, and copies of
                a frozen matrix are frozen.
            activation: (option) tells which one it is instead of trying all.

        Raises:
            TypeError, ValueError: ffn is no such module, or on the meta device; the
                options do not make a token's weights sum to 1; or one of gate and up,
                which become one parameter, is frozen.
        """
        from .replace import upcycle

        return upcycle(ffn, num_experts, top_k, **options)

    @classmethod
    def from_pretrained_block(
        cls, path_or_state_dict, layer=None, *, preset=None, device=None, dtype=None, **options
    ):
        """The MoE block of one layer of a published system's checkpoint.

            moe = MoE.from_pretrained_block("Mixtral-8x7B-v0.1/", layer=3, preset="mixtral_8x7b")

        What is in the checkpoint is known by its names alone (see `pretrained.FORMATS`):
        Mixtral, DeepSeek-V2 and V3, Grok-1, Switch Transformers, megablocks' dMoE, one
        tensor an expert or all in one. Quantised tensors (Grok-1's int8, DeepSeek-V3's
        float8) are multiplied with the scales beside them.

        Args:
            path_or_state_dict: a safetensors file, a folder of them with their index, or a
                dict of tensors. Only what is needed is read.
            layer: the layer's number; or what stands before the block's names
                ("decoder.block.1.layer.2.mlp"); or None where nothing does.
            preset: a name in `presets.PRESETS`, a dict of arguments, or None: all of them
                are in options. **options: of `MoE`, in place of the preset's.
            device, dtype: None: the CPU; the checkpoint's dtype, which the router may have
                for itself (bfloat16 for a quantised one).

        Raises:
            TypeError, ValueError: an unknown preset, no block there, or tensors that are
                missing, left over, or of another shape than the arguments make.
        """
        from .pretrained import from_pretrained_block

        return from_pretrained_block(
            cls, path_or_state_dict, layer, preset=preset, device=device, dtype=dtype, **options
        )

    def export_state_dict(self, format="transformers", layer=None):
        """The parameters under the names of a published system, {name: tensor}.

        What `from_pretrained_block` reads, bit for bit, and what serving engines do: one
        tensor an expert in "mixtral", "deepseek", "grok_per_expert" and "switch"; all in
        one in "transformers", "grok" and "megablocks". Tensors may share the memory of
        the parameters, as those of `state_dict()` do; safetensors saves them.

        Args:
            format: a name in `pretrained.FORMATS`.
            layer: a number or a prefix, as in `from_pretrained_block`; None: bare names.

        Raises:
            ValueError: an unknown format, or one without a name for a part of this layer.
        """
        from .pretrained import export_state_dict

        return export_state_dict(self, format, layer)

    # ---- the way of a token ------------------------------------------------------

    def forward(self, x, *, padding_mask=None, routing=None, return_routing=False):
        """See the class."""
        check_tokens(x, self.hidden_size)
        padding_mask = self._padding_of(x, padding_mask)
        if routing is None and not return_routing:
            operands = inference.operands(self, x)
            if operands is not None:
                y = inference.moe_infer(self, operands, x, padding_mask)
                return self._with_shared(y, x, padding_mask)
        tokens = x.reshape(-1, self.hidden_size)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
            # It may hold anything, and a gradient of 0 times NaN is NaN.
            tokens = tokens.masked_fill(padding_mask[:, None], 0)

        router_tokens = tokens
        if self.training and self.jitter_eps > 0:
            eps = self.jitter_eps
            router_tokens = tokens * torch.empty_like(tokens).uniform_(1 - eps, 1 + eps)
            if self.jitter_target == "block":
                tokens = router_tokens

        if routing is None:
            logits, route = self.gate(router_tokens, padding_mask)
            plan = self._plan(x.shape, route, padding_mask)
        else:
            check_routing(routing, tokens.shape[0], self.top_k, self.num_experts)
            logits, route = self.gate(router_tokens, padding_mask, routing.experts)
            plan = routing.plan
            if plan is None:
                plan = self._plan(x.shape, route, padding_mask)

        if self._stats.counts.device != logits.device:
            self._move_state(logits.device)
        weights, aux_loss, z_loss = self._losses(x, route, padding_mask, return_routing)
        if self.renormalize_after_drop:
            weights = renormalize_after_drop(weights, plan.assignment_row)
        if weights.dtype == torch.float64 and tokens.dtype != torch.float64:
            weights = weights.float()  # of a float64 router

        # Before the experts, whose weights push the routing out of the caches. An exported program
        # has no place for a tensor that is not a buffer and changes; meta tensors say nothing.
        if not (is_exporting() or logits.is_meta):
            for stats in (self._stats, *counting(self._routing_watchers, self.training)):
                stats.accumulate(
                    logits, route, plan.assignment_row, padding_mask, self.score_function,
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
        capacity, num_sequences = self._limits(shape)
        return capacity_scatter(
            route.experts, self.num_experts, capacity,
            weights=route.weights.detach() if self.drop_policy == "probs" else None,
            padding_mask=padding_mask, drop_policy=self.drop_policy, num_sequences=num_sequences,
        )  # fmt: skip

    def _limits(self, shape):
        """(capacity, num_sequences) for x of this shape."""
        if self.capacity_scope == "sequence":
            shape = (1, *shape)[-max(len(shape), 2) :]  # one token is a sequence
            tokens, num_sequences = shape[-2], max(math.prod(shape[:-2]), 1)
        else:
            tokens, num_sequences = math.prod(shape[:-1]), 1
        return self.capacity(tokens), num_sequences

    def capacity(self, tokens):
        """C, the most rows of one expert, for so many tokens in the mode that the layer is in.

        min(max(ceil(factor * tokens * top_k / num_experts), min_capacity), tokens), or
        None where the layer is dropless.
        """
        if self.expert_capacity is not None:
            return smaller(self.expert_capacity, tokens)
        ratio = self._capacity_ratios[
            "capacity_factor" if self.training else "eval_capacity_factor"
        ]
        return capacity_of(ratio, tokens, self.min_capacity, self.top_k)

    def _losses(self, x, route, padding_mask, return_routing):
        """(weights, aux_loss, z_loss); in training the weights carry the losses' gradient."""
        inject = (
            self.training
            and self.inject_losses
            and (self.aux_loss_coef > 0 or self.z_loss_coef > 0)
            and torch.is_grad_enabled()
            and route.weights.requires_grad
        )
        if not (inject or return_routing):
            return route.weights, None, None
        present = None if padding_mask is None else (~padding_mask).sum().clamp(min=1)
        weights, aux_loss, z_loss = route.weights, None, None
        if inject:
            if not (torch.compiler.is_compiling() or self._loss_scale_is_set):
                losses.warn_unscaled(x, self)
            weights = losses.inject(
                route, present, self.loss_scale, self.aux_loss_coef, self.z_loss_coef
            )
        if return_routing:
            score_sums, logsumexp = route.score_sums, route.logsumexp
            if self.inject_losses:
                score_sums, logsumexp = score_sums.detach(), logsumexp.detach()
            tokens = max(len(logsumexp), 1) if present is None else present
            aux_loss = losses.balance_loss(route.counts, score_sums, tokens, self.top_k)
            z_loss = losses.mean_square(logsumexp, tokens)
        return weights, aux_loss, z_loss

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

    def stats(self, reset=False):
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

    def reset_parameters(self):
        """Parameters as at construction, statistics and selection bias at zero; also after to_empty()."""
        for module in (self.gate, self.experts, self.shared_experts):
            if module is not None:
                module.reset_parameters()
        if self.shared_expert_gate is not None:
            nn.init.normal_(self.shared_expert_gate.weight, std=self.init_std)
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

    def extra_repr(self):
        capacity = (
            f"expert_capacity={self.expert_capacity}"
            if self.expert_capacity is not None
            else f"capacity_factor={self.capacity_factor}"
        )
        text = (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size},"
            f" num_experts={self.num_experts}, top_k={self.top_k}, activation={self.activation!r},"
            f" {capacity}, drop_policy={self.drop_policy!r}, aux_loss_coef={self.aux_loss_coef}"
        )
        for name in ("z_loss_coef", "jitter_eps", "bias_update_rate"):
            if getattr(self, name):
                text += f", {name}={getattr(self, name)}"
        return text
