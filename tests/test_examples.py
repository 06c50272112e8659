"""The main job at a toy size: it runs end to end, says what is wrong, and repeats itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import train_lm as script  # noqa: E402
from data import load_corpus  # noqa: E402

sys.path.pop(0)
TOY = (
    "--steps 6 --batch-size 4 --context 32 --width 32 --heads 2 --layers 2 --ffn-width 64"
    " --shared-width 32 --experts 4 --top-k 2 --validation-windows 8 --sample-bytes 8"
).split()


def run_example(*arguments, name="train_lm.py"):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with text to learn, and a binary and a hidden file to leave out."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        lines = (f"def f{i}_{j}(x):\n    return x * {j} + {i}\n" for j in range(60))
        (folder / f"module_{i}.py").write_text("".join(lines))
    (folder / "image.bin").write_bytes(b"\0\1\2" * 1000)
    (folder / ".hidden").write_text("secret " * 1000)
    return folder


@pytest.fixture(scope="module")
def study(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    process = run_example(*TOY, "--study", "--data", corpus, "--out", out)
    assert process.returncode == 0, process.stderr
    return process, out


def losses(folder):
    content = json.loads((folder / "results.json").read_text())
    return {(r["variant"], r["seed"]): r["validation_loss"] for r in content["results"]}


def test_the_study_ends_with_table_verdict_sample_and_pictures(study):
    process, out = study
    for label in ("dense", "MoE", "no balance loss", "capacity 2.0", "dropless"):
        assert any(line.startswith(label) for line in process.stdout.splitlines()), label
    assert "The MoE is" in process.stdout and "the MoE model writes" in process.stdout
    assert "loss" in process.stderr and "entropy" in process.stderr  # the progress bar
    for picture in ("loss.png", "load.png", "routing.png"):
        assert (out / picture).stat().st_size > 5000


def test_every_run_is_recorded(study):
    content = json.loads((study[1] / "results.json").read_text())
    results = {r["variant"]: r for r in content["results"]}
    assert "8 files" in content["settings"]["data"]
    for name, r in results.items():
        assert all(0 < loss < 8 for _, loss in r["validation_loss"] + r["train_loss"])
        assert r["parameters_active"] <= r["parameters_total"] and r["tokens_per_second"] > 0
        if name != "dense":
            assert len(r["load"]) == len(r["drop_rate"]) == len(r["entropy"]) == 6
            for _, layers in r["load"]:
                assert [sum(shares) for shares in layers] == pytest.approx([1, 1], abs=1e-4)
    dense, moe = results["dense"], results["moe"]
    router = 2 * 4 * 32  # layers, experts, width: all that the MoE has beyond the dense model
    assert moe["parameters_active"] - dense["parameters_total"] == router
    assert all(drop == 0 for _, drop in results["dropless"]["drop_rate"])
    assert results["capacity_1"]["drop_rate"] != results["moe"]["drop_rate"]


def test_the_same_seed_gives_the_same_losses_and_resume_keeps_them(study, corpus, tmp_path):
    first = losses(study[1])
    arguments = [*TOY, "--data", corpus, "--out", tmp_path, "--quiet"]
    assert run_example(*arguments).returncode == 0
    again = losses(tmp_path)
    assert again["dense", 0] == first["dense", 0] and again["moe", 0] == first["moe", 0]

    before = (tmp_path / "results.json").stat().st_mtime_ns
    assert run_example(*arguments, "--resume").returncode == 0
    assert (tmp_path / "results.json").stat().st_mtime_ns == before  # nothing ran again
    assert run_example(*arguments, "--resume", "--seeds", "2", "--runs", "dense").returncode == 0
    two = losses(tmp_path)
    assert two["dense", 0] == again["dense", 0] and two["dense", 1] != again["dense", 0]

    with pytest.raises(SystemExit, match="other settings"):
        script.main([*map(str, arguments), "--resume", "--steps", "7"])


def test_bad_arguments_are_refused_with_a_reason(tmp_path, capsys):
    short, empty = tmp_path / "short.txt", tmp_path / "empty"
    short.write_text("too little")
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_corpus(tmp_path / "missing")
    with pytest.raises(ValueError, match="too small: a context of 256 needs at least 514"):
        load_corpus(short)
    with pytest.raises(ValueError, match="no text"):
        load_corpus(empty)

    for arguments, reason in (
        ("--steps 0", "--steps must be positive"),
        ("--width 100 --heads 3", "multiple of 2 x --heads"),
        ("--top-k 9 --experts 8", "--top-k must be at most --experts"),
        ("--ffn-width 128 --shared-width 128", "positive multiple of --top-k"),
        ("--lr nan", "--lr must be positive"),
        ("--runs dense,sparse", "unknown sparse; known: dense, moe"),
        ("--study --runs dense", "either it or --runs"),
    ):
        with pytest.raises(SystemExit) as refused:
            script.parse(arguments.split())
        assert refused.value.code == 2 and reason in capsys.readouterr().err
    with pytest.raises(SystemExit, match="^train_lm.py: --data: no such file or folder: .*missing"):
        script.main(["--data", str(tmp_path / "missing")])


FINETUNE = (
    "--steps 6 --finetune-steps 6 --batch-size 4 --context 32 --width 32 --heads 2 --layers 2"
    " --expert-width 32 --experts 4 --rank 2 --validation-windows 8 --sample-bytes 8 --quiet"
).split()


def test_finetuning(corpus, tmp_path):
    """A Mixtral that is trained, saved, reloaded and fine-tuned; the adapters alone were trained."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    texts = ("--data", corpus, "--finetune-data", corpus)
    process = run_example(*FINETUNE, *texts, "--out", tmp_path, name="finetune_mixtral.py")
    assert process.returncode == 0, process.stderr
    for name in ("base/model.safetensors", "lora/adapter_model.safetensors", "routing.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "trained from scratch" in process.stdout
    assert "with LoRA, rank 2" in process.stdout
    assert "merged copy" not in process.stderr  # of what adapters go the other way for


def test_finetuning_of_bad_arguments(corpus):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    missing = run_example("--finetune-data", corpus / "no", name="finetune_mixtral.py")
    assert missing.returncode != 0
    assert "--finetune-data: no such file or folder" in missing.stderr
    top_k = run_example("--experts", 2, "--top-k", 3, name="finetune_mixtral.py")
    assert "--top-k must be at most --experts, got 3 of 2" in top_k.stderr
