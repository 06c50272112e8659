"""What the tests of `MoE` share: layers of unit scale, their options, one training step, closeness."""

import copy

import torch
from hypothesis import strategies as st

from moe_ext import MoE, reference
from support.naive_layer import naive_layer
from support.oracle import ACTIVATIONS, redraw, unit

H, I, E, K = 16, 12, 8, 2


def make(num_experts=E, top_k=K, hidden=H, width=I, seed=None, dtype=torch.float64, **options):
    """An MoE whose matrices have unit-scale effect, biases included."""
    if seed is not None:
        torch.manual_seed(seed)
    layer = MoE(hidden, width, num_experts, top_k, dtype=dtype, **options)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            transposed = layer.transposed and name.startswith("experts.")
            fan_in = (
                1 if p.dim() == 1 or name.endswith("_bias") else p.shape[-2 if transposed else -1]
            )
            p.copy_(unit(*p.shape, fan_in=fan_in))
        if layer.gate.e_score_correction_bias is not None:
            layer.gate.e_score_correction_bias.copy_(unit(num_experts) * 0.2)
    return layer


@st.composite
def options(draw):
    activation = draw(st.sampled_from(ACTIVATIONS))
    gated = activation in reference.GATES
    flag = st.booleans()
    shared = draw(st.sampled_from((0, 10)))
    drawn = dict(
        activation=activation,
        transposed=draw(flag),
        interleaved=gated and draw(flag),
        bias=draw(flag),
        gate_bias=draw(flag),
        score_function=draw(st.sampled_from(("softmax", "sigmoid", "softmax_topk"))),
        norm_topk_prob=draw(flag),
        routed_scaling_factor=draw(st.sampled_from((1.0, 2.5))),
        score_correction_bias=draw(flag),
        capacity_factor=draw(st.sampled_from((None, 0.5, 1.0, 1.25))),
        eval_capacity_factor=draw(st.sampled_from((None, 1.0))),
        min_capacity=draw(st.sampled_from((0, 1, 4))),
        expert_capacity=draw(st.sampled_from((None, None, 2))),
        capacity_scope=draw(st.sampled_from(("batch", "sequence"))),
        drop_policy=draw(st.sampled_from(("choice", "token", "probs"))),
        renormalize_after_drop=draw(flag),
        aux_loss_coef=draw(st.sampled_from((0.0, 0.1))),
        z_loss_coef=draw(st.sampled_from((0.0, 0.01))),
        shared_expert_intermediate_size=shared,
        shared_expert_gate=bool(shared) and draw(flag),
    )
    if gated and draw(flag):
        drawn |= dict(limit=1.0, up_offset=1.0)
        if activation == "swiglu":
            drawn["alpha"] = 1.702
    if draw(flag):
        drawn |= dict(
            n_group=4, topk_group=2, group_score=draw(st.sampled_from(("max", "top2_sum")))
        )
    return drawn


def step(layer, x, forward, **kwargs):
    """y, and the gradients of <y, cotangent> by x and every parameter."""
    x = x.detach().requires_grad_()
    y, loss = forward(layer, x, **kwargs)
    cotangent = unit(*y.shape, dtype=torch.float64).to(y.dtype)
    names = [name for name, _ in layer.named_parameters()]
    wanted = [x, *layer.parameters()]
    # 0 * x: where every token is padding, the expected output is a constant.
    total = (y * cotangent).sum() + loss + 0 * x.sum()
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, gradients)]
    return y.detach(), dict(zip(["x", *names], gradients))


def run(layer, x, **kwargs):
    return layer(x, **kwargs), 0.0


def run_naive(layer, x, padding_mask=None):
    """What the layer must do: in training its losses join the loop's own."""
    y, aux, z, _ = naive_layer(layer, x, padding_mask)
    return y, layer.aux_loss_coef * aux + layer.z_loss_coef * z if layer.training else 0.0


def assert_close(actual, expected, limit=1e-11, name=""):
    assert actual.shape == expected.shape, name
    scale = max(expected.norm().item(), 1e-3)
    assert (actual - expected).norm().item() <= limit * scale, name


def assert_step_matches(layer, x, padding_mask=None):
    again = redraw()
    y, gradients = step(layer, x, run, padding_mask=padding_mask)
    again()
    expected, expected_gradients = step(layer, x, run_naive, padding_mask=padding_mask)
    assert_close(y, expected)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], 1e-10, name)


def through_modules(layer):
    """A copy that calls its modules in inference too: the gate has a hook."""
    twin = copy.deepcopy(layer)
    twin.gate.register_forward_hook(lambda *_: None)
    return twin


def statistics(layer):
    return {name: t for name, t in vars(layer._stats).items() if t is not None}
