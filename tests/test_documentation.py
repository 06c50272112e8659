"""README.md and docs/: every Python block, run as it stands in what its text presupposes; every
name; and the numbers, which are those of the committed results."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_ext
from moe_ext import functional
from moe_ext._load import BACKEND
from support.layer_suite import E, H, I, make
from support.oracle import unit

ROOT = Path(__file__).parents[1]
PAGES = {p.name: p.read_text() for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = {
    f"{name}, block {i}": block
    for name, text in PAGES.items()
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S), 1)
}

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


@around("padding_mask=mask")
def padded(**_):
    names = dict(torch=torch, layer=make(hidden=256, dtype=torch.float32))
    yield names
    assert not names["y"][names["mask"]].any() and names["y"][~names["mask"]].any()


@around("moe_ext.padding(")
def padding_from_outside(**_):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = make(num_experts=4), make(num_experts=4)

        def forward(self, x):
            return self.decoder(self.encoder(x))

    model, x = Model(), unit(1, 9, H, dtype=torch.float64)
    mask = torch.arange(9)[None] < 5
    yield dict(moe_ext=moe_ext, model=model, x=x, attention_mask=mask.int())
    seen = [layer.stats()["tokens"] for layer in (model.encoder, model.decoder)]
    assert seen == [5 + 5, 5 + 9]


@around("replace_ffn(model")
def replaced(**_):
    ffn = torch.nn.Sequential(torch.nn.Linear(H, I), torch.nn.GELU(), torch.nn.Linear(I, H))
    model, x = torch.nn.Sequential(torch.nn.LayerNorm(H), ffn), unit(9, H, dtype=torch.float32)
    expected = model(x)
    yield dict(moe_ext=moe_ext, model=model)
    assert isinstance(model[1], moe_ext.MoE)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


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


@around("MoEConfig(")
def config(**_):
    names = dict(moe_ext=moe_ext)
    yield names
    assert names["layer"].config.router.top_k == 1 and names["layer"].capacity_factor == 2.0
    assert names["restored"] == names["layer"].config


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


@around("testing.compare")
def stage_by_stage(capsys, **_):
    layer = make()
    yield dict(moe_ext=moe_ext, layer=layer, x=unit(9, H, dtype=torch.float64))
    assert "capacity_scatter" in capsys.readouterr().out


@around("set_loss_scale")
def scaled(**_):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    layer = make()
    names = dict(moe_ext=moe_ext, model=layer, scaler=scaler, accumulation_steps=4)
    yield names
    assert layer.loss_scale == scaler.get_scale() / 4


def moved_biases(layer):
    layer(unit(9, H, dtype=torch.float64))
    return layer.gate.e_score_correction_bias.clone()


@around("update_router_biases(model)")
def balanced(**_):
    layer = make(bias_update_rate=0.1)
    before = moved_biases(layer)
    yield dict(moe_ext=moe_ext, model=layer)
    assert not torch.equal(layer.gate.e_score_correction_bias, before)


@around("update_router_biases_on_step")
def balanced_on_step(**_):
    layer = make(bias_update_rate=0.1)
    names = dict(moe_ext=moe_ext, model=layer, optimizer=torch.optim.SGD(layer.parameters()))
    yield names
    before = moved_biases(layer)
    names["optimizer"].step()
    assert not torch.equal(layer.gate.e_score_correction_bias, before)


@around("routing=routing")
def replayed(**_):
    names = dict(layer=make(), x=unit(9, H, dtype=torch.float64))
    yield names
    assert torch.equal(names["again"], names["y"])


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


@pytest.mark.skipif(
    BACKEND == "cuda", reason="the blocks' tensors are a CPU's, as their texts have them"
)
@pytest.mark.parametrize("place", BLOCKS)
def test_block(place, capsys, tmp_path, monkeypatch):
    block = BLOCKS[place]
    contexts = [AROUND[word] for word in AROUND if word in block]
    assert len(contexts) == 1, f"nothing here says what surrounds this block:\n{block}"
    context = contexts[0](capsys=capsys, tmp_path=tmp_path, monkeypatch=monkeypatch)
    names = next(context)
    exec(compile(block, place, "exec"), names)
    with pytest.raises(StopIteration):
        next(context)


def test_every_name_that_the_text_uses_is_there():
    """After `import moe_ext` alone, in a process of its own."""
    used = set(re.findall(r"`(moe_ext(?:\.\w+)+)", "".join(PAGES.values())))
    used -= {name for name in used if name.startswith("moe_ext.integrations")}
    assert "moe_ext.testing.compare" in used
    code = f"import moe_ext\nfor name in {sorted(used)}: eval(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_that_the_text_names_is_there():
    """By its path or, below the folder that a text is about, by its name."""
    text = "".join([*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text()])
    named = set(re.findall(r"`([\w./-]+\.(?:py|cpp|h|cuh?|inl|md|txt|json|ipynb|yml))`", text))
    # torch has those.
    named -= {"torch/library.h", "ATen/core/Tensor.h", "ATen/ops/....h", "torch/extension.h"}
    assert "csrc/schema.cpp" in named and "tiles.cuh" in named
    folders = ("csrc", "moe_ext", "tests", "benchmarks", "examples", "docs")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*.*")]
    paths = {f"/{p.relative_to(ROOT).as_posix()}" for p in [*files, *ROOT.glob("*.*")]}
    missing = {name for name in named if not any(path.endswith(f"/{name}") for path in paths)}
    assert not missing


@pytest.fixture
def writers(monkeypatch):
    """The modules that write the tables."""
    pytest.importorskip("transformers")
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(ROOT / folder)
    import publish_study
    import report_builds
    import report_layer
    import report_models
    import report_peers

    return publish_study, report_builds, report_layer, report_models, report_peers


def test_the_tables_are_the_committed_results(writers):
    publish_study, report_builds, report_layer, report_models, report_peers = writers
    results = {
        path.stem: json.loads(path.read_text())
        for path in (ROOT / "benchmarks" / "results").glob("*.json")
    }
    page, study = PAGES["benchmarks.md"], PAGES["training_study.md"]
    shown = {
        name
        for kind, table in {
            "builds_cpu": report_builds.table,
            "layer_cpu": report_layer.table,
            "models_cpu": report_models.table,
            "peers_": report_peers.short_table,
        }.items()
        for name in results
        if name.startswith(kind) and table(results[name]) in page
    }
    shown |= {
        f"study_{name}"
        for name in ("dense_vs_moe", "parts", "sweep")
        if publish_study.section(name, results[f"study_{name}"]) in study
    }
    assert shown == results.keys()
    models = [results[name] for name in sorted(results) if name.startswith("models_cpu")]
    assert report_models.summary(models) in PAGES["README.md"]
    assert report_peers.all_rows() == report_peers.ALL_ROWS.read_text()


def test_readme_s_claims_are_the_committed_results():
    text = PAGES["README.md"]
    results = ROOT / "tests" / "integrations" / "results" / "conformance.md"
    rows = re.findall(r"^\| \w+ \| \w+Experts \|.*", results.read_text(), re.M)
    pairs = re.findall(r"(\d\.\de-\d+) \((\d\.\de-\d+)\)", "".join(rows))
    worst = max(float(ours) / float(eager) for ours, eager in pairs)
    assert f"All {len(rows)} expert classes" in text
    assert f"at most {worst:.2f} times" in text

    kept, slower = {"train": [], "lora": []}, []
    for path in (ROOT / "benchmarks" / "results").glob("models_cpu*.json"):
        for case in json.loads(path.read_text())["cases"]:
            for task, result in case["tasks"].items():
                fastest = min(result["against"].values(), default=1)
                slower += [f"{fastest:.2f}x"] * (fastest < 1)
                if task in kept:
                    saved = dict(result["saved_bytes"])
                    kept[task].append(100 * saved.pop("moe_ext") / min(saved.values()))
    assert f"{min(kept['train']):.0f} to {max(kept['train']):.0f} %" in text
    assert f"{min(kept['lora']):.0f} % of PEFT's" in text
    assert (
        f"apart from two that decode single tokens in float32 ({' and '.join(sorted(slower))})"
        in (" ".join(text.split()))
    )
