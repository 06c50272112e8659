"""The benchmarks' own parts: fair rounds, honest results files, tables. No timing is judged."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_builds  # noqa: E402
import bench_models  # noqa: E402
import harness  # noqa: E402
import predict_hopper  # noqa: E402
import published  # noqa: E402
import report_models  # noqa: E402

sys.path.pop(0)

SMALL = dict(hidden_size=32, num_local_experts=8, num_experts_per_tok=2)
SIZES = {
    "mixtral": dict(intermediate_size=16),
    "olmoe": dict(intermediate_size=16),
    "qwen3": dict(moe_intermediate_size=16),
    "deepseek_v3": dict(moe_intermediate_size=16, n_group=2, topk_group=1),
    "gpt_oss": dict(intermediate_size=16),
}


@pytest.fixture
def small_models(monkeypatch):
    for name, sizes in SIZES.items():
        model = published.MODELS[name]
        small = model._replace(sizes={**model.sizes, **SMALL, **sizes}, tokens=8)
        monkeypatch.setitem(published.MODELS, name, small)
    monkeypatch.setattr(harness, "MemoryRead", lambda: lambda: None)  # a second and a gigabyte
    monkeypatch.setattr(published, "NUMBERS", 9973)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_models.py", *map(str, arguments)])
    bench_models.main()


def test_every_model_runs_every_task_and_becomes_a_table(small_models, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "models_cpu.json"
    run(monkeypatch, "--quick", "--repeats", 3, "--lora", "--out", out)
    cases = json.loads(out.read_text())["cases"]
    assert [(c["shape"], c["dtype"]) for c in cases] == [
        (name, dtype) for name in published.MODELS for dtype in ("float32", "bfloat16")
    ]
    for case in cases:
        assert list(case["tasks"]) == ["prefill", "decode_1", "decode_16", "train"]
        assert case["experts"] == case["experts_of_model"] == 8
        for result in case["tasks"].values():
            assert list(result["seconds"]) == list(published.IMPLEMENTATIONS)
            assert list(result["against"]) == ["grouped_mm", "batched_mm", "eager"]
            assert all(ratio > 0 for ratio in result["against"].values())
            assert result["rounds"] >= 3 and result["left_out"] == {}
        saved = case["tasks"]["train"]["saved_bytes"]
        assert 0 < saved["moe_ext"] < saved["grouped_mm"] < saved["batched_mm"]

    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- models_cpu -->\nold\n<!-- /models_cpu -->\nafter\n")
    monkeypatch.chdir(tmp_path)
    report_models.update_docs(out.name, page)  # a path as one types it
    text = page.read_text()
    assert text.startswith("before\n<!-- models_cpu -->\n![") and text.endswith(
        "<!-- /models_cpu -->\nafter\n"
    )
    assert sum("32 × 16, 8 experts, top 2" in line for line in text.splitlines()) == len(cases)
    assert out.with_suffix(".svg").exists() and "](../models_cpu.svg)" in text

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- models -->\n<!-- /models -->\nafter\n")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    report_models.update_readme(readme)
    assert readme.read_text().count(f", {len(published.MODELS)} blocks |") == 2


def test_a_table_says_when_every_peer_was_stopped():
    why = {"grouped_mm": "took over 8x as long", "eager": "took over 8x as long"}
    saved = {"moe_ext": 1e6, "grouped_mm": 3e6, "eager": 4e6}
    task = {"seconds": {"moe_ext": 2.0}, "against": {"eager": 1.5}, "left_out": {}}
    train = task | {"against": {}, "left_out": why, "saved_bytes": saved}
    case = dict.fromkeys(("hidden", "intermediate", "experts", "experts_of_model", "top_k"), 8)
    case |= {"checkpoint": "a/b", "dtype": "bfloat16", "tokens": 4, "date": "today", "commit": "c"}
    case["tasks"] = dict.fromkeys(report_models.TASKS, task) | {"train": train}
    versions = dict.fromkeys(
        ("cpu", "cores", "threads", "capability", "torch", "transformers", "python"), "?"
    )
    text = report_models.table({"machine": versions, "cases": [case]})
    assert "| 2000 ms, grouped_mm took over 8x as long | 1 MB (3 MB) |" in text
    assert text.count("2000 ms, 1.50x eager") == 3


def test_lora_is_timed_on_peft_s_adapters(small_models, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "models.json"
    monkeypatch.setattr(published, "LORA_RANK", 4)
    run(monkeypatch, "--quick", "--models", "olmoe", "--dtypes", "float32", "--out", out)
    lora = json.loads(out.read_text())["cases"][0]["tasks"]["lora"]
    assert lora["rank"] == 4 and list(lora["seconds"]) == list(published.IMPLEMENTATIONS)
    assert lora["saved_bytes"]["moe_ext"] < lora["saved_bytes"]["grouped_mm"]


def test_a_model_that_does_not_fit_has_its_experts_halved(small_models):
    model = published.MODELS["mixtral"]
    whole = published.make_block(model, torch.float32, "cpu", 1 << 30)
    size = published.weights_bytes(whole)
    halved = published.make_block(model, torch.float32, "cpu", 4 * size - 1)
    assert whole.experts.config.num_local_experts == 8
    assert halved.experts.config.num_local_experts == 4
    assert halved.gate.weight.shape == (4, 32)
    with pytest.raises(ValueError, match="Mixtral-8x7B-v0.1 do not fit"):
        published.make_block(model, torch.float32, "cpu", size / 8)


def test_contestants_share_the_parameters_and_no_two_experts_are_alike(small_models):
    block = published.make_block(published.MODELS["gpt_oss"], torch.float32, "cpu", 1 << 30)
    twins = published.on_every_implementation(block)
    for implementation, twin in twins.items():
        assert twin.experts.config._experts_implementation == implementation
        for ours, theirs in zip(block.parameters(), twin.parameters()):
            assert ours is theirs
    for stack in block.experts.parameters():
        assert len({expert.flatten()[0].item() for expert in stack.detach()}) == 8


def test_a_peer_with_another_result_is_not_timed(small_models, monkeypatch, tmp_path):
    from moe_ext.integrations.transformers import experts

    def wrong(*arguments):
        return 1.001 * right(*arguments)

    right = experts.experts_forward
    monkeypatch.setattr(experts, "experts_forward", wrong)
    try:
        with pytest.raises(RuntimeError, match="moe_ext: 1.00e-03 of eager's norm away"):
            run(monkeypatch, "--quick", "--models", "qwen3", "--out", tmp_path / "models.json")
    finally:
        monkeypatch.undo()
        experts.register()
    assert not list(tmp_path.iterdir())


def test_who_is_too_slow_is_stopped_in_the_backward_pass():
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            time.sleep(0.02)
            steps.append(ctx.saved_tensors)
            return dy

    def slow():
        y = x
        for _ in range(50):
            y = Slow.apply(y)
        y.sum().backward()

    steps = []
    x = torch.ones(2, requires_grad=True)
    calls = {"ours": lambda: time.sleep(0.02), "slow": slow}
    times = harness.interleaved(calls, 3, at_least=0, patience=0.2, give_up=5)
    assert times["slow"] == [] and len(times["ours"]) == 3
    assert 1 <= len(steps) < 25
    assert list(harness.compared(times)["seconds"]) == ["ours"]


def test_rounds_fill_a_time_and_stay_within_another(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def calls(seconds, **limits):
        def call():
            now[0] += seconds
            count.append(1)

        count = []
        harness.interleaved({"ours": call}, 5, turn=0, **limits)
        return len(count) - 2  # less the two that warm up

    assert calls(0.001, at_least=0) == 5
    assert calls(0.002, at_least=0.1) in (49, 50)
    assert calls(0.02, at_least=0, at_most=0.08) in (3, 4)
    assert calls(0.02, at_least=0, at_most=0) == 3
    assert calls(0.02, patience=0.01) == 0  # counts by the call after the warm-up


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    times = {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 2.0, 8.0], "once": [8.0], "stopped": []}
    result = harness.compared(times)
    assert result["rounds"] == 3
    assert result["seconds"] == {"ours": 2.0, "peer": 3.0, "once": 8.0}
    assert result["against"] == {"peer": 2.0, "once": 4.0}


def test_a_build_beside_itself(monkeypatch, tmp_path):
    """Two processes of this checkout: every task is timed on both, at one commit."""
    out = tmp_path / "builds.json"
    arguments = [ROOT, "--cases", "overhead", "--repeats", 3, "--threads", 1, "--out", out]
    monkeypatch.setattr(sys, "argv", ["bench_builds.py", *map(str, arguments)])
    bench_builds.main()
    cases = json.loads(out.read_text())["cases"]
    assert [case["dtype"] for case in cases] == ["float32", "bfloat16"]
    for case in cases:
        assert list(case["tasks"]) == ["forward", "train"]
        assert case["before"] == case["commit"]
        assert str(ROOT) not in case["command"].split("--out")[0]
        for result in case["tasks"].values():
            assert list(result["seconds"]) == ["before", "now"]
            assert list(result["against"]) == ["before"]


# ---- what a GPU should take ----------------------------------------------------------------


def test_the_committed_prediction_is_what_its_script_says():
    assert predict_hopper.RESULT.read_text() == predict_hopper.text()


def test_a_prediction_is_no_faster_than_its_bound():
    for shape in predict_hopper.SHAPES.values():
        forward, backward = predict_hopper.kernels(shape)
        # 4 R H I operations for up and 2 for down, and twice as many backward.
        product = 6 * shape.rows * shape.hidden * shape.intermediate
        assert sum(k.flops for k in forward) == product
        assert sum(k.flops for k in backward) == 2 * product
        for chip in predict_hopper.CHIPS.values():
            for kernel in (*forward, *backward):
                assert kernel.seconds(chip) * chip.tensor > kernel.flops
                assert kernel.seconds(chip) * chip.memory >= kernel.bytes * (1 - 1e-9)
            for layer in predict_hopper.layers(shape, chip):
                assert layer.seconds > layer.bound


def test_what_was_measured_stands_beside_its_prediction(monkeypatch, tmp_path, capsys):
    """As a profiler names and orders the kernels of a training step; what is missing has no row."""
    name, s = "7b_n256", predict_hopper.SHAPES["7B n256"]
    chip = predict_hopper.CHIPS["H200"]
    seconds = {k.name: k.seconds(chip) for k in sum(predict_hopper.kernels(s), [])}
    order = ("up", "down", "combine", "dA", "dX", "combine dX", "dW up", "dW down")
    kinds = {n: kind for kind, names in predict_hopper.LAUNCHED.items() for n in names}
    launched = [["moe_ext::topk_kernel", 1.0]]
    launched += [[f"void moe_ext::cuda::{kinds[n]}<T>", seconds[n] * 1.1] for n in order]
    case = dict(
        shape=name, kind="train", tokens=s.tokens, hidden=s.hidden, intermediate=s.intermediate,
        num_experts=s.experts, top_k=s.top_k, kernels=launched,
        forward={"seconds": {"ours": 1.0}}, forward_backward={"seconds": {"ours": 3.0}},
    )  # fmt: skip
    serve = case | dict(shape="serve", kind="serve", weights_bytes=4.3e9, graph_seconds=1.2e-3)
    results = dict(
        machine={"gpu": "NVIDIA H200"}, cases=[case, serve],
        dense_flops=chip.tensor, copy_bandwidth=chip.memory / 1.14,
    )  # fmt: skip
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["predict_hopper.py", str(file)])
    predict_hopper.main()
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    off = {row[0].strip(): row[3].strip() for row in rows}
    assert off.pop("a dense product of 8192") == "+0%" and off.pop("a copy of 1 GiB") == "+14%"
    assert off.pop("serve: graph, by its weights") == "+20% **over 15%**"
    assert all("over 15%" in off.pop(f"{name}: {way}") for way in ("forward", "forward_backward"))
    assert off == {f"{name}: {n}": "+10%" for n in order}
    del launched[1]
    assert set(predict_hopper.measured_kernels(launched)) == set(order) - {"up", "down", "dA", "dX"}
    file.unlink()
    with pytest.raises(SystemExit, match="nothing was measured"):
        predict_hopper.main()
