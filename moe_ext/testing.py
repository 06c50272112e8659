"""Where two paths part: every stage of a layer against the float64 reference.

    print(moe_ext.testing.compare(layer, x))

Each stage runs alone, on inputs that the reference made in float64, so that an
error shows in the stage that makes it and in no later one.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional, reference
from .moe import MoE
from .types import Activation, Plan

__all__ = [
    "Comparison",
    "Row",
    "compare",
    "compare_stages",
    "error_limit",
    "evaluate",
    "relative_error",
]


class Row(NamedTuple):
    """One result of one stage: an output, or d_<input> for the gradient of an input."""

    stage: str
    result: str
    error: float  # relative Frobenius norm; for integers the share of wrong entries
    limit: float  # how large it may be

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


class Comparison(list):
    """The rows of a comparison; as text a table."""

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self)

    def __str__(self):
        line = "{:<17} {:<16} {:>9} {:>9}  {}".format
        return "\n".join(
            [line("stage", "result", "error", "limit", "")]
            + [
                line(r.stage, r.result, f"{r.error:.2e}", f"{r.limit:.2e}", "ok" if r.ok else "OFF")
                for r in self
            ]
        )

    __repr__ = __str__


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """|actual - oracle| / |oracle| in Frobenius norm and float64; inf where actual is not
    zero and the oracle is, or where one of the two is not finite."""
    difference = (actual.detach().double() - oracle.detach().double()).norm().item()
    norm = oracle.detach().double().norm().item()
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 and difference < float("inf") else float("inf")


def error_limit(baseline_error: float, dtype: torch.dtype) -> float:
    """How far a result may be from float64: 1.5 times the error of plain PyTorch in
    `dtype` (`baseline_error`), but at least 4 eps.

    float64 is its own baseline: it is allowed 64 eps, for another order of summation.
    """
    floor = (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    return max(1.5 * baseline_error, floor)


def evaluate(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    frozen: Collection[str] = (),
    cotangents: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """{name: tensor}: the outputs of function(**inputs), then `d_<input>` for the gradient
    of every floating input that is not in `frozen` (zeros where autograd gives None).

    Outputs that are differentiable take drawn unit-scale cotangents; pass a dict
    to use the same ones in another dtype (it is filled on the first call).
    """
    inputs = {
        name: t.detach().requires_grad_(t.is_floating_point() and name not in frozen)
        if isinstance(t, Tensor)
        else t
        for name, t in inputs.items()
    }
    output = function(**inputs)
    if isinstance(output, Tensor):
        output = {"output": output}
    elif hasattr(output, "_asdict"):
        output = output._asdict()
    elif not isinstance(output, dict):
        output = {f"output{i}": t for i, t in enumerate(output)}
    cotangents = {} if cotangents is None else cotangents
    differentiable = [name for name, t in output.items() if t.requires_grad]
    for name in differentiable:
        t = output[name]
        if name not in cotangents:
            cotangents[name] = torch.randn(t.shape, dtype=torch.float64, device=t.device).to(
                t.dtype
            )
    wanted = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    gradients: dict[str, Tensor | None] = {name: None for name in wanted}
    if differentiable and wanted:
        found = torch.autograd.grad(
            [output[name] for name in differentiable],
            list(wanted.values()),
            [cotangents[name].to(output[name].dtype) for name in differentiable],
            allow_unused=True,
        )
        gradients = dict(zip(wanted, found))
    result = {name: t.detach() for name, t in output.items()}
    for name, gradient in gradients.items():
        result[f"d_{name}"] = torch.zeros_like(wanted[name]) if gradient is None else gradient
    return result


def in_float64(inputs):
    """The oracle's inputs: the same values, floating tensors in float64."""
    return {
        name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in inputs.items()
    }


def compare(layer: MoE, x: Tensor, padding_mask: Tensor | None = None) -> Comparison:
    """Runs the stages of a `MoE` layer one by one on x (..., H), as the layer would in
    its present mode: a Comparison.

    For every stage the path that moe_ext takes (see MOE_EXT_BACKEND) against
    `moe_ext.reference` in float64, outputs and gradients of drawn cotangents, with
    the limit that plain PyTorch in the layer's dtype sets. Near-ties may be chosen
    either way; a choice that is worse by more than rounding counts as wrong. Shared
    experts, jitter and losses are no stages and left out; the layer is not changed.
    """
    gate, config = layer.gate, layer.config
    capacity, num_sequences = config.room(x.shape, layer.training)
    mask = None if padding_mask is None else padding_mask.reshape(-1)
    return compare_stages(
        x,
        gate=dict(weight=gate.weight, bias=gate.bias),
        experts=layer.experts.weights()._asdict(),
        top_k=config.router.top_k,
        router_dtype=config.router.router_dtype,
        routing=dict(
            selection_bias=gate.e_score_correction_bias,
            padding_mask=mask,
            **config.router.scoring(),
        ),
        scatter=dict(
            capacity=capacity,
            padding_mask=mask,
            drop_policy=config.capacity.drop_policy,
            num_sequences=num_sequences,
        ),
        activation=config.experts.activation,
    )


def compare_stages(
    x: Tensor,
    gate: Mapping[str, Tensor | None],
    experts: Mapping[str, Tensor | None],
    *,
    top_k: int,
    router_dtype: torch.dtype | None = None,
    routing: Mapping[str, Any] | None = None,
    scatter: Mapping[str, Any] | None = None,
    activation: Activation | str = "swiglu",
) -> Comparison:
    """`compare` without a layer, on x (T, H) and bare tensors.

    gate: weight (E, H), and bias (E) or None. experts: up_proj, down_proj, and
    up_bias, down_bias or None. routing, scatter: the options of `topk_route` and
    `capacity_scatter`; activation: of the experts' stages.
    """
    routing, scatter = routing or {}, scatter or {}
    rows = Comparison()

    def run(stage, inputs, **options):
        def call(module, inputs):
            return evaluate(
                lambda **tensors: getattr(module, stage)(**tensors, **options),
                {name: t for name, t in inputs.items() if t is not None},
                cotangents=cotangents,
            )

        cotangents = {}
        oracle = call(reference, in_float64(inputs))
        actual, baseline = call(functional, inputs), call(reference, inputs)
        for name, result in actual.items():
            if result.is_floating_point():
                error = relative_error(result, oracle[name])
                limit = error_limit(relative_error(baseline[name], oracle[name]), result.dtype)
            else:
                error = (result != oracle[name]).double().mean().item() if result.numel() else 0.0
                limit = 0.0
            rows.append(Row(stage, name, error, limit))
        return oracle

    x = x.detach().reshape(-1, x.shape[-1])
    router = {"x": x, **{name: t for name, t in gate.items() if t is not None}}
    if router_dtype is not None:
        router = {name: t.to(router_dtype) for name, t in router.items()}
    accumulation = reference.accumulation_dtype(router["x"].dtype)
    num_experts = router["weight"].shape[0]
    logits = run("router_logits", router)["output"].to(accumulation)
    rows.append(_compare_choice(logits, top_k, routing))
    # The values are compared for one and the same choice.
    chosen = reference.topk_route(logits.double(), top_k, **routing).experts
    route = run("topk_route", dict(logits=logits), top_k=top_k, **{**routing, "experts": chosen})
    weights = route["weights"].to(reference.accumulation_dtype(x.dtype))
    plan = run(
        "capacity_scatter",
        dict(experts=chosen),
        num_experts=num_experts,
        weights=weights,
        **scatter,
    )
    plan = Plan(**plan)
    made = run("grouped_ffn", dict(x=x, **experts), plan=plan, activation=activation)
    run("weighted_combine", dict(rows=made["output"].to(x.dtype), weights=weights), plan=plan)
    run("moe_forward", dict(x=x, weights=weights, **experts), plan=plan, activation=activation)
    return rows


def _compare_choice(logits, top_k, routing):
    """The share of assignments whose expert is worse than the reference's: what it
    scores in float64 is less by more than rounding explains."""
    ours = functional.topk_route(logits, top_k, **routing).experts
    theirs = reference.topk_route(logits.double(), top_k, **routing).experts
    scores = reference.scores_of(logits.double(), routing.get("score_function", "softmax"))
    if routing.get("selection_bias") is not None:
        scores = scores + routing["selection_bias"]
    num_experts = scores.shape[-1]
    ours, theirs = ours.long().clamp(max=num_experts), theirs.long().clamp(max=num_experts)
    scores = torch.nn.functional.pad(scores, (0, 1), value=-torch.inf)  # of padding's id, E
    gap = torch.where(ours == theirs, 0.0, scores.gather(-1, theirs) - scores.gather(-1, ours))
    wrong = (gap > 8 * torch.finfo(logits.dtype).eps).double()
    return Row("topk_route", "choice", wrong.mean().item() if wrong.numel() else 0.0, 0.0)
