"""Upcycling and replacing: the model computes what it did, under any names of its parts."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moe_ext
from moe_ext import MoE
from support.oracle import ACTIVATIONS, bits_equal, relative_error, unit

PHI = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


class Gated(nn.Module):
    """Its parts in an order and under names of its own."""

    def __init__(self, hidden, width, name="swiglu", bias=False):
        super().__init__()
        self.phi = PHI[GATED[name]]
        self.out = nn.Linear(width, hidden, bias)
        self.value = nn.Linear(hidden, width, bias)
        self.switch = nn.Linear(hidden, width, False)

    def forward(self, x):
        return self.out(self.phi(self.switch(x)) * self.value(x))


class Fused(nn.Module):
    """Gate and up in one map."""

    def __init__(self, hidden, width, order):
        super().__init__()
        self.up, self.down, self.order = (
            nn.Linear(hidden, 2 * width),
            nn.Linear(width, hidden),
            order,
        )

    def forward(self, x):
        h = self.up(x)
        a, b = h.chunk(2, -1) if self.order != "interleaved" else (h[..., ::2], h[..., 1::2])
        return self.down(F.silu(b) * a if self.order == "up first" else F.silu(a) * b)


class Plain(nn.Module):
    def __init__(self, hidden, width, name="gelu", bias=True):
        super().__init__()
        self.phi = PHI[name]
        self.fc1, self.fc2 = nn.Linear(hidden, width, bias), nn.Linear(width, hidden, bias)

    def forward(self, x):
        return self.fc2(self.phi(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, hidden, ffn):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden, 2, batch_first=True)
        self.norm, self.mlp = nn.LayerNorm(hidden), ffn

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


def assert_same_function(layer, ffn, limit=1e-12):
    x = unit(3, 7, layer.hidden_size, dtype=layer.gate.weight.dtype)
    for training in (True, False):
        y, expected = layer.train(training)(x), ffn.train(training)(x)
        assert relative_error(y.detach(), expected.detach().double()) < limit


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_activation_is_told_by_what_it_does(name, bias):
    torch.manual_seed(len(name))
    ffn = (Gated if name in GATED else Plain)(12, 20, name, bias).double()
    layer = MoE.from_dense(ffn, num_experts=4, top_k=2)
    assert layer.activation == name and layer.capacity_factor is None
    assert_same_function(layer, ffn)


@pytest.mark.parametrize(
    "make_ffn",
    [
        lambda: Fused(12, 20, "gate first"),
        lambda: Fused(12, 20, "up first"),
        lambda: Fused(12, 20, "interleaved"),
        lambda: Gated(16, 16),  # square: no shape says which map is which
        lambda: Plain(16, 16),
        lambda: Plain(20, 12),
        lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12, bias=False)),
        lambda: nn.Sequential(nn.Dropout(0.0), Plain(12, 20, bias=False)),
    ],
)
def test_every_arrangement(make_ffn):
    ffn = make_ffn().double()
    assert_same_function(MoE.from_dense(ffn, 4), ffn)


@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=4),
        dict(score_function="sigmoid"),
        dict(score_function="softmax_topk", norm_topk_prob=False),
        dict(transposed=True),
        dict(interleaved=True, transposed=True),
        dict(shared_expert_intermediate_size=6, shared_expert_gate=True),
        dict(gate_bias=True, bias_update_rate=0.1),
        dict(capacity_factor=4.0),
    ],
)
def test_every_layout_and_routing(options):
    ffn = Gated(12, 20, bias=True).double()
    assert_same_function(MoE.from_dense(ffn, 4, **options), ffn)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_a_token_starts_dense_and_can_learn(score_function, dtype):
    ffn = Gated(12, 20, bias=True).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = MoE.from_dense(
            ffn, 4, top_k=1, score_function=score_function, aux_loss_coef=0.0, dtype=dtype
        )
    assert_same_function(layer, ffn, 1e-4 if dtype == torch.float32 else 1e-2)
    x = unit(200, 12, dtype=dtype)
    y, routing = layer.train()(x, return_routing=True)
    y.square().sum().backward()
    assert layer.gate.weight.grad.norm() > 0.1
    assert routing.plan.expert_counts.min() > 10  # the start is no collapse


@pytest.mark.filterwarnings("ignore:MoE. a single weight")
def test_one_expert_a_token_may_be_told_to_weigh_1():
    ffn = Gated(12, 20, bias=True).double()
    assert_same_function(MoE.from_dense(ffn, 4, top_k=1, norm_topk_prob=True), ffn)
    assert_same_function(MoE.from_dense(ffn, 4, top_k=1, score_function="softmax_topk"), ffn)


def test_the_dense_layer_stays_as_it_was():
    ffn = Plain(12, 20).bfloat16().eval()
    state = copy.deepcopy(ffn.state_dict())
    layer = MoE.from_dense(ffn, 4, init_std=0.0)
    assert layer.gate.weight.dtype == torch.bfloat16 and not layer.training and not ffn.training
    assert bits_equal(state, ffn.state_dict())
    with torch.no_grad():
        layer.experts.down_proj.zero_()
    assert bits_equal(state, ffn.state_dict())
    assert all(p.requires_grad for p in (*layer.parameters(), *ffn.parameters()))
    with pytest.warns(UserWarning, match="dropout"):
        MoE.from_dense(
            nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.1), nn.Linear(6, 4)), 2
        )


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.zero_(),  # of the last layer alone, see below
        lambda t: t.mul_(1e-20),
        lambda t: t.mul_(1e15),
        lambda t: t.add_(50.0),
    ],
    ids=["zero", "tiny", "huge", "shifted"],
)
def test_the_activation_is_told_whatever_the_weights(name, change):
    """A last layer of zeros is how residual branches are often initialised: all fit then."""
    torch.manual_seed(len(name))
    ffn = (Gated if name in GATED else Plain)(12, 12, name, True)
    with torch.no_grad():
        for part, p in ffn.named_parameters():
            if part.startswith(("out", "fc2")) or change(torch.ones(1)) != 0:
                change(p)
    layer = MoE.from_dense(ffn, num_experts=2)
    assert layer.activation == name
    ups = (ffn.switch, ffn.value) if name in GATED else (ffn.fc1,)
    assert bits_equal(layer.experts.weights()[0][1], torch.cat([up.weight for up in ups]))


@pytest.mark.parametrize("phi", [nn.ReLU6(), nn.Hardtanh(0, 100.0), nn.Softplus(20.0), nn.Mish()])
def test_an_activation_that_is_only_nearly_one_of_ours(phi):
    ffn = nn.Sequential(nn.Linear(4, 64), phi, nn.Linear(64, 4))
    with pytest.raises(ValueError, match="computes something else"):
        MoE.from_dense(ffn)


def test_several_that_fit_are_refused(monkeypatch):
    monkeypatch.setattr("moe_ext.dense._distance", lambda actual, expected: 0.0)
    with pytest.raises(ValueError, match=r"activation must be named where several fit \(silu, "):
        MoE.from_dense(Plain(4, 6))
    assert MoE.from_dense(Plain(4, 6), activation="relu").activation == "relu"


def test_trying_it_out_is_not_noticed():
    ffn, seen = Plain(12, 20), []
    hooks = [
        ffn.register_forward_pre_hook(lambda *_: seen.append("before")),
        ffn.fc1.register_forward_hook(lambda *_: seen.append("after")),
        nn.modules.module.register_module_forward_hook(lambda *_: seen.append("any")),
    ]
    try:
        before = torch.get_rng_state()
        moe_ext.dense.read_dense(ffn)
        assert not seen and torch.equal(before, torch.get_rng_state())
        ffn(unit(2, 12))
        assert seen == ["before", "any", "after", "any", "any"]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
)
def test_made_inside_a_context(context):
    ffn = Plain(12, 20).double()
    net = nn.Sequential(Block(12, ffn)).double()
    with context():
        layer = MoE.from_dense(ffn, 4)
        moe_ext.replace_ffn(net, 4)
    assert_same_function(layer, ffn)
    for trained in (layer, net):
        trained(unit(2, 3, 12, dtype=torch.float64)).sum().backward()
        assert all(p.requires_grad for p in trained.parameters())


def test_a_compiled_ffn():
    ffn = Plain(12, 20).double()
    assert_same_function(MoE.from_dense(torch.compile(ffn, backend="eager"), 4), ffn)


def test_copies_of_what_is_frozen_are_frozen():
    ffn = Gated(12, 20, bias=True)
    ffn.out.weight.requires_grad_(False)
    experts = MoE.from_dense(ffn, 4).experts
    frozen = [name for name, p in experts.named_parameters() if not p.requires_grad]
    assert frozen == ["down_proj"]
    ffn.value.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad alike in gate and up"):
        MoE.from_dense(ffn)


class Odd(Plain):
    def forward(self, x):
        return super().forward(x) + 1


class Tupled(Plain):
    def forward(self, x):
        return super().forward(x), None


@pytest.mark.parametrize(
    "error,ffn,options,text",
    [
        (TypeError, torch.relu, {}, "ffn must be a torch.nn.Module"),
        (ValueError, nn.Linear(4, 4), {}, "two or three linear maps H -> I -> H"),
        (ValueError, nn.Sequential(Plain(4, 6), nn.LayerNorm(4)), {}, "without other parameters"),
        (ValueError, Odd(4, 6), {}, "computes something else"),
        (ValueError, Tupled(4, 6), {}, "computes something else"),
        (ValueError, nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4)]), {}, "NotImplementedError"),
        (ValueError, Plain(4, 6), dict(activation="relu"), "computes something else"),
        (ValueError, Plain(4, 6), dict(activation="tanh"), "activation must be one of"),
        (ValueError, Plain(4, 6).to("meta"), {}, "meta device"),
        (ValueError, Plain(4, 6), dict(norm_topk_prob=False), "weights must sum to 1"),
        (ValueError, Plain(4, 6), dict(routed_scaling_factor=2.5), "weights must sum to 1"),
        (ValueError, Plain(4, 6), dict(top_k=9), "top_k must be an integer from 1 to 8, got 9"),
    ],
)
def test_what_cannot_be_upcycled(error, ffn, options, text):
    with pytest.raises(error, match=text):
        MoE.from_dense(ffn, **options)


def model(hidden=12):
    blocks = [Block(hidden, Gated(hidden, 20)), Block(hidden, Plain(hidden, 20))]
    return nn.Sequential(nn.Linear(5, hidden), *blocks, nn.Linear(hidden, 3)).double()


@pytest.mark.parametrize(
    "match,names",
    [
        (None, ["1.mlp", "2.mlp"]),
        ("*.mlp", ["1.mlp", "2.mlp"]),
        (Plain, ["2.mlp"]),
        (lambda name, module: name.startswith("1") and isinstance(module, Gated), ["1.mlp"]),
    ],
)
def test_replace_swaps_in_place_and_says_what(match, names):
    net = model()
    x = unit(2, 6, 5, dtype=torch.float64)
    expected = net(x)
    swapped = moe_ext.replace_ffn(net, 4, 2, match=match)
    assert list(swapped) == names
    assert all(net.get_submodule(name) is layer for name, layer in swapped.items())
    assert relative_error(net(x).detach(), expected.detach()) < 1e-12
    assert isinstance(net[0], nn.Linear) and isinstance(net[1].attention, nn.MultiheadAttention)
    with pytest.raises(ValueError, match="found none"):  # all that is left is inside an MoE
        moe_ext.replace_ffn(net, match=lambda name, module: "experts" in name)


def test_replace_with_fresh_experts():
    net = model()
    swapped = moe_ext.replace_ffn(
        net, 16, 4, upcycled=False, intermediate_size=5, aux_loss_coef=0.5
    )
    layer = swapped["1.mlp"]
    assert layer.experts.gate_up_proj.shape == (16, 10, 12) and layer.aux_loss_coef == 0.5
    assert swapped["2.mlp"].activation == "gelu" and not bits_equal(
        layer.experts.down_proj[0], layer.experts.down_proj[1]
    )
    with pytest.raises(ValueError, match="intermediate_size must be left out"):
        moe_ext.replace_ffn(model(), intermediate_size=5)


def test_fresh_experts_on_the_meta_device():
    with torch.device("meta"):
        net = nn.Sequential(Block(12, Gated(12, 20)), Block(12, Plain(12, 20, "relu2")))
    with pytest.raises(ValueError, match="upcycled=False"):
        moe_ext.replace_ffn(net, 4)
    swapped = moe_ext.replace_ffn(net, 4, upcycled=False)
    assert [layer.activation for layer in swapped.values()] == ["swiglu", "relu2"]
    assert all(p.is_meta for p in net.parameters())
    net = net.to_empty(device="cpu")
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    net(unit(2, 3, 12)).sum().backward()
    assert swapped["0.mlp"].stats()["tokens"] == 6


def test_a_shared_ffn_becomes_a_shared_layer():
    ffn = Plain(12, 20)
    net = nn.Sequential(Block(12, ffn), Block(12, ffn)).double()
    swapped = moe_ext.replace_ffn(net, 4)
    assert list(swapped) == ["0.mlp", "1.mlp"] and net[0].mlp is net[1].mlp


@pytest.mark.parametrize(
    "error,arguments,text",
    [
        (TypeError, dict(match=3), "match must be None, a pattern of names"),
        (ValueError, dict(match="nothing"), "found none"),
        (ValueError, dict(match="*"), "0: MoE.from_dense: ffn must"),
        (ValueError, dict(top_k=99), "top_k must be"),
    ],
)
def test_replace_changes_nothing_when_it_fails(error, arguments, text):
    net = model()
    before = [type(m) for m in net.modules()]
    with pytest.raises(error, match=text):
        moe_ext.replace_ffn(net, **arguments)
    assert [type(m) for m in net.modules()] == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5"])
def test_models_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    common = dict(vocab_size=40, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=2)  # fmt: skip
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, **common)
    elif family == "t5":
        config = transformers.T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8,
                                       dropout_rate=0.0, decoder_start_token_id=0, **common)  # fmt: skip
    else:
        config = {"llama": transformers.LlamaConfig, "phi3": transformers.Phi3Config}[family](
            **small, **common
        )
    auto = {"t5": transformers.AutoModelForSeq2SeqLM}.get(family, transformers.AutoModelForCausalLM)
    net = auto.from_config(config).double().eval()
    ids = torch.randint(1, 40, (2, 5))
    inputs = dict(input_ids=ids, labels=ids)
    expected = net(**inputs).logits
    swapped = moe_ext.replace_ffn(net, 4)
    assert len(swapped) == (4 if family == "t5" else 2)
    assert relative_error(net(**inputs).logits.detach(), expected.detach()) < 1e-7
