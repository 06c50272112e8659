"""The main job at a toy size: it runs end to end, says what is wrong, and repeats itself."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from moe_ext._load import BACKEND  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import plots  # noqa: E402
import publish_study  # noqa: E402
import train_lm as script  # noqa: E402
from comparison import Comparison  # noqa: E402
from data import load_corpus  # noqa: E402
from report import Result, read_sweep, verdicts  # noqa: E402

sys.path.pop(0)
TOY = (
    "--steps 6 --batch-size 4 --context 32 --width 32 --heads 2 --layers 2 --ffn-width 64"
    " --experts 4 --top-k 2 --validation-windows 8 --sample-bytes 8"
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
def sweep(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    process = run_example(*TOY, "--sweep", "--data", corpus, "--out", out, "--quiet")
    assert process.returncode == 0, process.stderr
    return out / "results.json"


@pytest.fixture(scope="module")
def study(corpus, sweep, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    arguments = ("--study", "--seeds", 1, "--rates", sweep, "--data", corpus, "--out", out)
    process = run_example(*TOY, *arguments)
    assert process.returncode == 0, process.stderr
    return process, out


def losses(folder):
    content = json.loads((folder / "results.json").read_text())
    return {(r["variant"], r["seed"]): r["validation_loss"] for r in content["results"]}


def test_the_study_ends_with_table_verdict_sample_and_pictures(study):
    process, out = study
    for label in ("dense", "MoE", "no balance loss", "capacity 1.25", "shared expert"):
        assert any(line.startswith(label) for line in process.stdout.splitlines()), label
    assert "MoE cannot be told from dense" in process.stdout  # of one seed
    assert "the MoE model writes" in process.stdout
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
            assert len(r["load"]) == len(r["drop_rate"]) == len(r["entropy"]) <= 6
            for _, layers in r["load"]:
                assert [sum(shares) for shares in layers] == pytest.approx([1, 1], abs=1e-4)
    dense, moe = results["dense"], results["moe"]
    router = 2 * 4 * 32  # layers, experts, width: all that the MoE has beyond the dense model
    assert moe["parameters_active"] - dense["parameters_total"] == router
    assert results["shared"]["parameters_active"] == moe["parameters_active"]
    assert all(drop == 0 for _, drop in moe["drop_rate"])
    assert any(drop > 0 for _, drop in results["capacity_1"]["drop_rate"])


def test_each_model_takes_the_best_rate_of_the_sweep(study, sweep):
    content = json.loads((study[1] / "results.json").read_text())
    recorded = content["sweep"]["losses"]
    assert all(len(of_rate) == len(script.RATES) for of_rate in recorded.values())
    for name, of_rate in recorded.items():
        best = float(min(of_rate, key=of_rate.get))
        assert {r["rate"] for r in content["results"] if r["variant"] == name} == {best}
    assert {r["seed"] for r in json.loads(sweep.read_text())["results"]} == {script.SWEEP_SEED}


def test_as_long_means_as_many_steps_as_take_the_dense_model_s_time():
    args = script.parse(["--runs", "dense,moe_equal_time", "--seeds", "1", "--steps", "1000"])
    runs = script.planned(args, {"dense": 1e-3, "moe": 2e-3}, {"dense": 50.0, "moe": 40.0})
    assert runs == [("dense", 0, 1e-3, 1000), ("moe_equal_time", 0, 2e-3, 800)]


def test_a_sweep_without_one_of_the_models_is_refused(sweep, tmp_path):
    content = json.loads(sweep.read_text())
    content["results"] = [r for r in content["results"] if r["variant"] != "dense"]
    (tmp_path / "half.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="half.json lacks dense"):
        read_sweep(tmp_path / "half.json")
    with pytest.raises(SystemExit, match="--rates: no such file"):
        script.main(["--rates", str(tmp_path / "none.json")])


# (the MoE's losses by seed, the dense model's, which verdict): differences of -0.03 +- 0.025,
# the same with more spread, the mirror image, and one seed that says nothing of its spread.
@pytest.mark.parametrize(
    "moe, dense, standing",
    (
        ((1.46, 1.47, 1.48), (1.50, 1.50, 1.50), "is ahead of"),
        ((1.45, 1.47, 1.49), (1.50, 1.50, 1.50), "cannot be told from"),
        ((1.54, 1.53, 1.52), (1.50, 1.50, 1.50), "is behind"),
        ((1.40,), (1.50,), "cannot be told from"),
        ((1.50, 1.50), (1.50, 1.50), "cannot be told from"),
        # Seeds differ by more than the models do, but both in the same way.
        ((1.40, 1.51, 1.60), (1.44, 1.54, 1.65), "is ahead of"),
        # What counted as a lead when a fixed 0.005 was the threshold.
        ((1.48, 1.52, 1.47), (1.50, 1.50, 1.50), "cannot be told from"),
    ),
)
def test_the_verdict_takes_the_seeds_spread_for_its_measure(moe, dense, standing):
    assert Comparison(moe, dense).standing == standing
    runs = [
        Result(name, label, seed, 1e-3, 1, 1, validation_loss=[(10, loss)],
               tokens_per_cpu_second=speed)
        for name, label, losses, speed in (("dense", "dense", dense, 10), ("moe", "MoE", moe, 8))
        for seed, loss in enumerate(losses)
    ]  # fmt: skip
    sentence, rule = verdicts(runs)
    assert sentence.startswith(f"MoE {standing} dense:") and "95 %" in rule
    assert "after 10 steps" in sentence and "0.80 times the tokens per CPU second" in sentence


def test_the_margin_is_student_s():
    # The differences' deviation is 0.01; t for two degrees of freedom is 4.30265.
    expected = 4.30265 * 0.01 / 3**0.5
    assert Comparison((1.46, 1.47, 1.48), (1.5,) * 3).margin == pytest.approx(expected, rel=1e-3)


def test_the_same_seed_gives_the_same_losses_and_resume_keeps_them(study, sweep, corpus, tmp_path):
    first = losses(study[1])
    arguments = [*TOY, "--rates", sweep, "--data", corpus, "--out", tmp_path, "--quiet"]
    assert run_example(*arguments, "--seeds", 1, "--jobs", 1).returncode == 0
    again = losses(tmp_path)
    assert again["dense", 0] == first["dense", 0] and again["moe", 0] == first["moe", 0]

    before = (tmp_path / "results.json").stat().st_mtime_ns
    assert run_example(*arguments, "--seeds", 1, "--resume").returncode == 0
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
        ("--ffn-width 90", "--ffn-width must be a multiple of 2 x --top-k"),
        ("--jobs 0", "--jobs must be positive"),
        ("--sweep --lr 1e-3", "either it or --lr"),
        ("--lr nan", "--lr must be positive"),
        ("--runs dense,sparse", "unknown sparse; known: dense, moe"),
        ("--study --runs dense", "either it or --runs"),
        ("--study --lr 1e-3", "moe_equal_time goes by the speeds of a sweep"),
    ):
        with pytest.raises(SystemExit) as refused:
            script.parse(arguments.split())
        assert refused.value.code == 2 and reason in capsys.readouterr().err
    with pytest.raises(SystemExit, match="^train_lm.py: --data: no such file or folder: .*missing"):
        script.main(["--data", str(tmp_path / "missing")])


def test_pictures_can_be_read(study):
    """No two labels of an axis overlap, no two runs look alike, the scale begins below the start."""
    content = json.loads((study[1] / "results.json").read_text())
    for figure in plots.pictures([Result(**r) for r in content["results"]]).values():
        figure.draw_without_rendering()
        for axis in figure.axes:
            for axis_labels in (axis.get_xticklabels(), axis.get_yticklabels()):
                boxes = [label.get_window_extent() for label in axis_labels if label.get_text()]
                assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
            named = [x for x in axis.get_lines() if not x.get_label().startswith("_")]
            for looks in ({x.get_color() for x in named}, {x.get_marker() for x in named}):
                assert len(looks) == len(named)
            assert axis.get_legend() or not named
        if figure.axes[0].get_title().startswith("Validation loss"):
            first = max(r["validation_loss"][0][1] for r in content["results"])
            assert figure.axes[0].get_ylim()[1] < first
        plots.plt.close(figure)


def test_a_study_s_section_has_its_verdicts_and_the_sweep_s_lowest_losses(study, sweep):
    content = json.loads((study[1] / "results.json").read_text())
    text = publish_study.section("parts", content)
    assert f"at {content['commit']}: " in text
    assert all(f"\n- {verdict}\n" in text for verdict in content["verdicts"][:-1])
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in rows} == {publish_study.COLUMNS.count("|") + 2}
    assert len(rows) == 2 + len(script.VARIANTS)

    text = publish_study.section("sweep", json.loads(sweep.read_text()))
    for name, label in (("dense", "dense"), ("moe", "MoE")):
        lowest = min(content["sweep"]["losses"][name].values())
        row = next(line for line in text.splitlines() if line.startswith(f"| {label}, "))
        assert row.count("**") == 2 and f"**{lowest:.4f}**" in row


def test_published_studies_name_commits_of_this_history():
    shallow = subprocess.run(
        ("git", "rev-parse", "--is-shallow-repository"), cwd=ROOT, capture_output=True, text=True
    )
    if shallow.stdout.strip() != "false":
        pytest.skip("this is no repository, or one without its history")
    files = sorted((ROOT / "benchmarks" / "results").glob("study_*.json"))
    commits = {file.name: json.loads(file.read_text())["commit"] for file in files}
    assert commits and all(map(publish_study.in_history, commits.values())), commits
    assert not publish_study.in_history("0123456")


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
    assert re.search(r"moe_ext keeps \d+% of the bytes, in \d+% of the CPU", process.stdout)
    assert "merged copy" not in process.stderr  # of what adapters go the other way for


def test_finetuning_of_bad_arguments(corpus):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    missing = run_example("--finetune-data", corpus / "no", name="finetune_mixtral.py")
    assert missing.returncode != 0
    assert "--finetune-data: no such file or folder" in missing.stderr
    top_k = run_example("--experts", 2, "--top-k", 3, name="finetune_mixtral.py")
    assert "--top-k must be at most --experts, got 3 of 2" in top_k.stderr


@pytest.mark.skipif(BACKEND in ("emulated", "cuda"), reason="it trains for some seconds, on a CPU")
def test_the_notebook_s_collapse_is_one_and_both_cures_help():
    """Its cells, run as they stand; they are committed without outputs."""
    notebook = ROOT / "examples" / "dense_to_moe.ipynb"
    cells = [
        cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert not any(cell["outputs"] for cell in cells)
    threads = torch.get_num_threads()
    names = {}
    try:
        for i, cell in enumerate(cells):
            exec(compile("".join(cell["source"]), f"{notebook.name}, code cell {i}", "exec"), names)
    finally:
        torch.set_num_threads(threads)
    plots.plt.close(names["figure"])
    assert names["difference"] < 1e-5  # the outputs are of order 1
    assert names["moe_loss"] < 0.5 * names["dense_loss"]
    assert names["healthy"]["dead_experts"] == 0 and names["moe_shares"][-1] < 0.3
    assert names["collapsed_shares"][-1] > 0.9
    assert names["collapsed_loss"] > 0.9 * names["dense_loss"]
    for cure in ("balanced", "biased"):
        assert names[f"{cure}_shares"][-1] < 0.5
        assert names[f"{cure}_loss"] < 0.6 * names["collapsed_loss"]
