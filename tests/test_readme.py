"""Every Python block of the README, run as it stands in what its text presupposes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_ext
from layer_suite import E, H, I, make
from moe_ext import functional
from moe_ext._load import BACKEND
from oracle import unit

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)

pytestmark = pytest.mark.skipif(
    BACKEND == "cuda", reason="the blocks' tensors are a CPU's, as their texts have them"
)

# What stands around a block that has a word: a generator of its names, which checks at its end
# what the block has made of them.
AROUND = {}


def around(word):
    return lambda function: AROUND.setdefault(word, function)


@around("class Block")
def first_example(capsys, **_):
    names = {}
    yield names
    assert "'drop_rate'" in capsys.readouterr().out
    assert names["block"].ffn.gate.weight.grad.any()


@around("parameter_groups")
def helpers(**_):
    block = make(num_experts=4, top_k=1)
    names = dict(torch=torch, moe_ext=moe_ext, block=block)
    yield names
    decays = [group["weight_decay"] for group in names["optimizer"].param_groups]
    assert decays == [0.1, 0.0]
    assert {m.dim() for m in names["experts"]["params"]} == {2}
    experts = sum(p.numel() for p in block.experts.parameters())
    assert names["total"] - names["active"] == experts * 3 // 4


@around("from_pretrained_block")
def checkpoint(tmp_path, monkeypatch, **_):
    save_file = pytest.importorskip("safetensors.torch").save_file
    small = dict(hidden_size=H, intermediate_size=I, num_experts=E)
    monkeypatch.setitem(
        moe_ext.presets.PRESETS, "mixtral_8x7b", moe_ext.presets.MIXTRAL_8X7B.replace(**small)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Mixtral-8x7B-v0.1").mkdir()
    layer = make(dtype=torch.bfloat16, capacity_factor=None)
    written = layer.export_state_dict("mixtral", layer=3)
    save_file(
        {name: t.contiguous() for name, t in written.items()},
        tmp_path / "Mixtral-8x7B-v0.1" / "model.safetensors",
    )
    names = dict(moe_ext=moe_ext)
    yield names
    assert names["tensors"].keys() == written.keys()
    assert all(torch.equal(names["tensors"][name], t) for name, t in written.items())


@around("export_mixtral")
def upcycled(tmp_path, monkeypatch, **_):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=H, intermediate_size=I, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(20)[None]
    expected = dense(ids).logits
    monkeypatch.chdir(tmp_path)
    names = dict(
        moe_ext=moe_ext, llama=dense, AutoModelForCausalLM=transformers.AutoModelForCausalLM
    )
    yield names
    mixtral = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "mixtral")
    for model in (names["llama"], mixtral):
        assert model is not dense
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@around("functional.router_logits")
def stages(**_):
    layer = make(num_experts=8, top_k=2, capacity_factor=None)
    up, down, *_ = layer.experts.weights()
    x = unit(9, H, dtype=torch.float64)
    names = dict(
        functional=functional, x=x, gate_weight=layer.gate.weight, gate_up_proj=up, down_proj=down
    )
    yield names
    torch.testing.assert_close(names["y"], layer.eval()(x))


@around("RoutingCallback")
def in_transformers(monkeypatch, **_):
    transformers = pytest.importorskip("transformers")
    given = {}

    class AutoModelForCausalLM:
        @staticmethod
        def from_pretrained(name, experts_implementation):
            given[name] = experts_implementation
            config = transformers.DbrxConfig(
                d_model=32, n_heads=4, n_layers=1, max_seq_len=64, vocab_size=50,
                ffn_config=dict(ffn_hidden_size=20, moe_num_experts=6, moe_top_k=3),
                attn_config=dict(kv_n_heads=4, clip_qkv=100.0, rope_theta=1e4),
            )  # fmt: skip
            return transformers.DbrxForCausalLM(config)  # whose experts replace() knows

    def Trainer(model, arguments, callbacks):
        given["callbacks"] = callbacks
        return model

    names = dict(AutoModelForCausalLM=AutoModelForCausalLM, Trainer=Trainer, name="a/model")
    yield names
    assert given["a/model"] == "moe_ext"
    assert isinstance(given["callbacks"][0], transformers.TrainerCallback)
    ids = torch.randint(50, (2, 7))
    assert names["model"](ids).logits.isfinite().all()


@around("LoraConfig")
def lora(**_):
    transformers, peft = (pytest.importorskip(name) for name in ("transformers", "peft"))
    from moe_ext.integrations.transformers import register

    register()
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32, num_local_experts=4, experts_implementation="moe_ext",
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    names = dict(LoraConfig=peft.LoraConfig, get_peft_model=peft.get_peft_model, model=model)
    yield names
    model = names["model"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    model(torch.randint(32, (2, 5))).logits.sum().backward()
    assert any(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("place", range(len(BLOCKS)))
def test_block(place, capsys, tmp_path, monkeypatch):
    block = BLOCKS[place]
    contexts = [AROUND[word] for word in AROUND if word in block]
    assert len(contexts) == 1, f"nothing here says what surrounds this block:\n{block}"
    context = contexts[0](capsys=capsys, tmp_path=tmp_path, monkeypatch=monkeypatch)
    names = next(context)
    exec(compile(block, f"README.md, block {place}", "exec"), names)
    with pytest.raises(StopIteration):
        next(context)


def test_every_name_that_the_text_uses_is_there():
    """After `import moe_ext` alone, in a process of its own."""
    used = set(re.findall(r"`(moe_ext(?:\.\w+)+)", (ROOT / "README.md").read_text()))
    used -= {name for name in used if name.startswith("moe_ext.integrations")}
    assert "moe_ext.testing.compare" in used
    code = f"import moe_ext\nfor name in {sorted(used)}: eval(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
