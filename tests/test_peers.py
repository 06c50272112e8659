"""The benchmark beside other libraries, with fakes in their place. No timing is judged."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_peers  # noqa: E402
import harness  # noqa: E402
import peers  # noqa: E402
import report_peers  # noqa: E402
from peers import processes  # noqa: E402
from workers import WorkerFailed  # noqa: E402

sys.path.pop(0)

FAKE = """
import os, signal, sys, time
import bench_peers

TITLE, VENV, REQUIREMENTS = "Fake {name}", None, ()
DTYPES, NEEDS = {dtypes!r}, {needs!r}


def experts(gate_up_proj, down_proj):
    def bind(x, weights, experts):
        def run():
            y = bench_peers.float64_result(gate_up_proj, down_proj, x, weights, experts).to(x.dtype)
            {action}
            return y

        return run

    return bind
"""


@pytest.fixture
def add_fake(monkeypatch, tmp_path):
    """Adds a peer in the benchmark's own environment, which has y when `action` comes."""

    def add(name, action="pass", dtypes=("float32", "bfloat16"), needs=()):
        text = FAKE.format(name=name, action=action, dtypes=dtypes, needs=needs)
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, f"peers.{name}", importlib.import_module(name))
        monkeypatch.setattr(peers, "NAMES", (*peers.NAMES, name))

    monkeypatch.setattr(peers, "NAMES", ())
    monkeypatch.setattr(processes, "READ", 1 << 20)
    monkeypatch.setattr(bench_peers, "SHAPES", {"tiny": bench_peers.Shape(32, 16, 8, 2, (1, 40))})
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return add


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the benchmark; returns its cases by shape and dtype."""

    def run(*arguments):
        out = tmp_path / "peers_test.json"
        argv = ["bench_peers.py", "--quick", "--threads", "1", "--out", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        bench_peers.main()
        return {
            (case["shape"], case["dtype"]): case for case in json.loads(out.read_text())["cases"]
        }

    return run


def test_all_sides_are_compared_and_become_tables(add_fake, run, monkeypatch, tmp_path):
    add_fake("chatty", "print('{}', flush=True)")
    add_fake("single", "time.sleep(1e-3)", dtypes=("float32",))
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- peers_cpu -->\n<!-- /peers_cpu -->\nafter\n")
    monkeypatch.setattr(report_peers, "ALL_ROWS", tmp_path / "peers.md")
    cases = run()
    assert list(cases) == [(f"tiny_{T}", d) for d in ("float32", "bfloat16") for T in (1, 40)]
    for (_, dtype), case in cases.items():
        sides = ["ours", "chatty", "single"] if dtype == "float32" else ["ours", "chatty"]
        assert list(case["seconds"]) == list(case["errors"]) == sides
        assert list(case["against"]) == sides[1:] and min(case["against"].values()) > 0
        assert 0 < case["errors"]["ours"] < bench_peers.TOLERANCE[dtype]
        assert case["left_out"] == ({} if len(sides) == 3 else {"single": "has no bfloat16"})
        assert case["environments"] == dict.fromkeys(sides)
        assert case["rounds"] == 3

    report_peers.update_docs(tmp_path / "peers_test.json", page)
    short = page.read_text()
    assert short.startswith("before\n<!-- peers_cpu -->\n") and short.endswith("-->\nafter\n")
    assert short.count("| Fake chatty |") == 2 and short.count("| Fake single |") == 1
    rows = report_peers.ALL_ROWS.read_text()
    assert f"## {harness.instruction_set()}\n" in rows
    assert rows.count("\n| 32, 16, 8, 2 |") == len(cases)
    assert "- Fake single is left out of 2 rows: has no bfloat16" in rows


def test_a_short_table_has_the_geometric_mean_and_the_lowest(add_fake, monkeypatch):
    add_fake("fake")
    versions = ("cpu", "cores", "threads", "instruction_set", "capability")
    versions += ("torch", "transformers", "python")

    def case(tokens, against):
        shape = {"hidden": 1, "intermediate": 2, "num_experts": 3, "top_k": 4}
        shape |= {"shape": f"s{tokens}", "tokens": tokens, "dtype": "float32"}
        return shape | {"against": {"fake": against}, "date": "today", "commit": "c"}

    results = {"machine": dict.fromkeys(versions, "?"), "peers": {"fake": "fake==1"}}
    results["cases"] = [case(1, 0.5), case(16, 8.0), case(512, 3.0)]
    text = report_peers.short_table(results)
    few, many = (
        "2.00x, at least 0.50x (1, 2, 3, 4; T 1)",
        "3.00x, at least 3.00x (1, 2, 3, 4; T 512)",
    )
    assert f"| Fake fake | float32 | {few} | {many} |" in text
    assert "fake==1. Measured today at c." in text


@pytest.mark.parametrize(
    "action, message",
    [
        ("y[-1] *= 1.01", "wrong: y is 1.00e-02 of its norm away from float64's, over 0.0001"),
        ("y[0, 0] = float('nan')", "wrong: y is nan of its norm away from float64's"),
        ("y = y[:, :-1]", r"wrong: y must be \(1, 32\), got \(1, 31\)"),
    ],
)
def test_a_peer_with_a_wrong_result_is_an_error(add_fake, run, tmp_path, action, message):
    add_fake("wrong", action)
    with pytest.raises(RuntimeError, match=message):
        run("--dtypes", "float32")
    assert not (tmp_path / "peers_test.json").exists()


def test_who_cannot_run_is_left_out_with_the_reason(add_fake, run, monkeypatch):
    add_fake("strange", needs=("no_such_flag",))
    add_fake("absent")
    add_fake("raising", "raise ValueError('no such kernel')")
    monkeypatch.setattr(sys.modules["peers.absent"], "VENV", "no_such_environment")
    case = run("--dtypes", "float32")["tiny_1", "float32"]
    assert list(case["seconds"]) == ["ours"]
    assert case["left_out"] == {
        "strange": "needs no_such_flag",
        "absent": "not installed as pinned (make peers)",
        "raising": "ValueError: no such kernel",
    }


def test_another_version_than_the_pinned_does_not_count_as_installed(
    add_fake, monkeypatch, tmp_path
):
    add_fake("pinned")
    peer = sys.modules["peers.pinned"]
    monkeypatch.setattr(peers, "BUILD", tmp_path)
    monkeypatch.setattr(peer, "VENV", "venv")
    monkeypatch.setattr(peer, "REQUIREMENTS", ("a==2", "b"))
    stamp = peers.stamp_of("venv")
    stamp.parent.mkdir()
    stamp.write_text("a==1\nb\n")
    assert peers.obstacle(peer, "float32") == "not installed as pinned (make peers)"
    stamp.write_text("a==2\nb\n")
    assert peers.obstacle(peer, "float32") is None


def test_a_worker_is_stopped_out_of_turn_and_ends_with_the_benchmark(add_fake):
    with processes.start(None, 1) as worker:
        with pytest.raises(WorkerFailed, match="ModuleNotFoundError: No module named 'x'"):
            worker.ask("prepare", "x", "no file")
        _, status = os.waitpid(worker.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
    assert worker.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "action, why",
    [
        ("os.kill(os.getpid(), signal.SIGILL)", "its process ended with -4"),
        ("sys.stderr.write('out of luck'); os._exit(3)", "its process ended with 3: out of luck"),
        ("time.sleep(60)", "bind took over 5 s"),
    ],
)
def test_a_process_that_ends_or_hangs_is_reported(add_fake, tmp_path, action, why):
    add_fake("fatal", action)
    weights = {"gate_up_proj": torch.ones(8, 32, 32), "down_proj": torch.ones(8, 32, 16)}
    tokens = bench_peers.make_tokens(bench_peers.SHAPES["tiny"], 1, torch.float32)
    torch.save(weights, tmp_path / "weights")
    torch.save(tokens, tmp_path / "tokens")
    with processes.start(None, 1, patience=60) as worker:
        worker.ask("prepare", "fatal", str(tmp_path / "weights"))
        worker.patience = 5
        with pytest.raises(WorkerFailed, match=why):
            worker.ask("bind", "fatal", str(tmp_path / "tokens"), str(tmp_path / "y"))


@pytest.mark.parametrize(
    "flags, name",
    [
        ("avx2 avx512bw avx512_bf16 amx_bf16", "AMX"),
        ("avx2 avx512bw avx512_bf16", "AVX-512 BF16"),
        ("avx2 avx512bw", "AVX-512"),
        ("avx2", "AVX2"),
        ("", "baseline"),
    ],
)
def test_the_best_instruction_set_is_named(monkeypatch, flags, name):
    monkeypatch.setattr(harness, "cpu_flags", lambda: frozenset(flags.split()))
    assert harness.instruction_set() == name
    assert report_peers.path_for(name).name in (
        "peers_amx.json",
        "peers_avx512_bf16.json",
        "peers_avx512.json",
        "peers_avx2.json",
        "peers_baseline.json",
    )
