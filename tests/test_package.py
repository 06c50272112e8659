"""The package around the layer: what the library says of itself, what is refused and how,
the forced backends, the diagnosis, the comparison of two paths."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import moe_ext
from ffn_suite import needs_ops
from moe_ext import __main__, _load, functional, testing

ROOT = Path(moe_ext.__file__).resolve().parent.parent
needs_library = pytest.mark.skipif(
    _load.BACKEND == "reference" or _load.find_library() is None,
    reason="runs without the compiled library",
)


def python(*arguments, cwd=None, **environment):
    """A fresh Python that finds moe_ext beside `cwd` first."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(cwd or ROOT),
        "OMP_NUM_THREADS": "1",
    } | environment
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


def import_error(folder, **environment):
    """The last line that `import moe_ext` prints where it fails; no backend is forced."""
    done = python("-c", "import moe_ext", cwd=folder, **{"MOE_EXT_BACKEND": ""} | environment)
    assert done.returncode, "the import succeeded"
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def copied(tmp_path):
    """A folder with a copy of the package, its library included."""
    shutil.copytree(
        ROOT / "moe_ext", tmp_path / "moe_ext", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


def doctor(folder, **changes):
    """Changes what the copied library says it was built with, in place."""
    library = _load.find_library(folder / "moe_ext")
    content = library.read_bytes()
    old = json.dumps(_load.read_build_info(library)).encode()
    assert content.count(old) == 1
    new = json.dumps({**json.loads(old), **changes}).encode()
    # The padding is white space inside of the JSON: the length must stay.
    assert len(new) <= len(old)
    new = new[:-1] + b" " * (len(old) - len(new)) + b"}"
    library.unlink()  # never write into a file that may be mapped
    library.write_bytes(content.replace(old, new))


def test_a_commit_is_linted_as_make_lint_does():
    """pre-commit installs the versions of the extra `lint`."""
    pinned, installed = (
        set(re.findall(r'"((?:ruff|clang-format)==[^"]+)"', (ROOT / name).read_text()))
        for name in ("pyproject.toml", ".pre-commit-config.yaml")
    )
    assert pinned == installed and len(pinned) == 2


class TestBuildInfo:
    @needs_library
    @pytest.mark.skipif(
        _load.BACKEND == "emulated", reason="one process cannot hold both libraries' ops"
    )
    def test_read_from_the_file_is_what_the_module_says(self):
        from moe_ext import _C

        info = _load.read_build_info(_load.find_library())
        assert json.dumps(info) == _C.build_info.removeprefix("moe_ext build info: ")
        assert info["torch"] == torch.__version__
        assert info.keys() == {"torch", "cuda", "python", "archs", "git", "compiler"}

    def test_a_file_without_it_is_refused(self, tmp_path):
        for content in (b"", b"\x7fELF something else"):
            (tmp_path / "_C.so").write_bytes(content)
            with pytest.raises(ImportError, match="does not say what it was built with"):
                _load.read_build_info(tmp_path / "_C.so")

    @pytest.mark.parametrize(
        "built, told",
        [
            (dict(torch="2.13.0+cpu"), []),
            (dict(torch="2.13.0"), []),
            (dict(torch="2.13.1"), ["torch 2.13.1", "torch 2.13.0+cu130"]),
            (dict(torch="2.12.0+cu130"), ["torch 2.12.0+cu130", "torch 2.13.0+cu130"]),
            (dict(cuda="13.0"), []),
            (dict(cuda="12.8"), ["cuda 12.8", "cuda 13.0"]),
            (dict(python="3.11.2"), []),
            (dict(python="3.12.7"), ["python 3.12.7", "python 3.11.7"]),
        ],
    )
    def test_what_fits_and_what_does_not(self, built, told):
        runs = dict(torch="2.13.0+cu130", cuda="13.0", python="3.11.7")
        built = dict(torch="2.13.0+cu130", cuda=None, python="3.11.7") | built
        problems = _load.mismatches(built, runs)
        assert len(problems) == bool(told)
        assert all(text in problems[0] for text in told)

    def test_a_cuda_library_needs_a_cuda_torch(self):
        built = dict(torch="2.13.0", cuda="13.0", python="3.11.7")
        runs = dict(torch="2.13.0", cuda=None, python="3.11.7")
        assert _load.mismatches(built, runs) == [
            "it was built with cuda 13.0, but cuda (none) runs"
        ]

    @pytest.mark.parametrize(
        "archs, runs, does_not",
        [
            (["x86_64"], [], [(8, 0), (9, 0)]),
            (["x86_64", "sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
            (["x86_64", "sm_86"], [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
            (["sm_80", "sm_90a"], [(8, 9), (9, 0)], [(7, 5), (10, 0)]),
            (["sm_90a", "compute_90a"], [(9, 0)], [(8, 0), (10, 0)]),
            (["sm_80", "compute_80"], [(8, 0), (9, 0), (10, 0), (12, 1)], [(7, 5)]),
            (["sm_120", "compute_120"], [(12, 0), (12, 1)], [(9, 0), (10, 3)]),
        ],
    )
    def test_which_gpus_it_runs_on(self, archs, runs, does_not):
        assert all(_load.runs_on(archs, capability) for capability in runs)
        assert not any(_load.runs_on(archs, capability) for capability in does_not)


class TestRefusals:
    """Each says both sides and the command that mends it, before the library is loaded."""

    @needs_library
    def test_another_torch(self, copied):
        doctor(copied, torch="2.9.1")
        message = import_error(copied)
        assert message.startswith("ImportError: moe_ext: ")
        assert "built with torch 2.9.1, but torch " + torch.__version__ in message
        assert "Rebuild it: " in message

    @needs_library
    def test_another_python(self, copied):
        doctor(copied, python="3.9.1")
        assert "built with python 3.9.1, but python" in import_error(copied)

    @needs_library
    def test_a_library_of_another_python_only(self, copied):
        library = _load.find_library(copied / "moe_ext")
        doctor(copied, python="3.9.1")
        library.rename(library.with_name("_C.cpython-39-x86_64-linux-gnu.so"))
        assert "built with python 3.9.1, but python" in import_error(copied)

    @needs_library
    def test_a_library_older_than_the_python_sources(self, copied):
        ops = copied / "moe_ext" / "_ops.py"
        ops.write_text(ops.read_text() + '\n_fake("not_compiled_yet")(lambda x: x)\n')
        message = import_error(copied)
        assert "not_compiled_yet" in message and "Rebuild it: " in message

    @needs_library
    def test_no_library(self, copied):
        _load.find_library(copied / "moe_ext").unlink()
        message = import_error(copied)
        assert "the compiled library is missing. Build it: " in message
        assert "MOE_EXT_BACKEND=reference" in message

    @needs_library
    def test_a_damaged_library(self, copied):
        library = _load.find_library(copied / "moe_ext")
        library.unlink()
        library.write_bytes(b"")
        assert "does not say what it was built with" in import_error(copied)

    @needs_library
    def test_a_source_tree_in_front_of_the_installed_package(self, copied, tmp_path_factory):
        site = tmp_path_factory.mktemp("site")
        (copied / "setup.py").touch()
        library = _load.find_library(copied / "moe_ext")
        (site / "moe_ext").mkdir()
        library.rename(site / "moe_ext" / library.name)
        (site / "moe_ext-0.1.0.dist-info").mkdir()
        (site / "moe_ext-0.1.0.dist-info" / "METADATA").write_text(
            "Name: moe_ext\nVersion: 0.1.0\n"
        )
        message = import_error(copied, PYTHONPATH=f"{copied}{os.pathsep}{site}")
        assert f"hides the installed package {site / 'moe_ext'}. Run Python in another" in message

    @pytest.mark.parametrize("version", ("2.10.1", "1.13.0+cu117", "2.9.0a0+git1"))
    def test_a_torch_that_is_too_old(self, version):
        with pytest.raises(
            ImportError, match="supports torch 2.11 to 2.14, found torch " + version[:4]
        ):
            _load.check_torch(version)

    def test_a_torch_that_is_untested(self):
        with pytest.warns(UserWarning, match="2.11 to 2.14, found torch 2.15.0.*it is untested"):
            _load.check_torch("2.15.0")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for version in ("2.11.0+cu130", "2.14.1", "2.13.0a0+git1234"):
                _load.check_torch(version)

    def test_pyproject_has_the_same_range(self):
        (oldest, newest), text = _load.TORCH, (ROOT / "pyproject.toml").read_text()
        assert f'"torch>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"' in text

    def test_no_compiler_names_the_package_to_install(self, tmp_path):
        done = python(
            str(ROOT / "setup.py"), "build_ext", "--build-temp", str(tmp_path),
            "--build-lib", str(tmp_path), PYTHONPATH=str(ROOT), CXX="/nowhere/g++",
            MOE_EXT_BUILD="cpu", cwd=ROOT,
        )  # fmt: skip
        assert done.returncode and "/nowhere/g++ was not found" in done.stderr, done.stderr
        assert "apt-get install g++" in done.stderr


class TestSilence:
    """What would otherwise go another way without a word."""

    @needs_library
    @pytest.mark.skipif(bool(_load.BUILD_INFO and _load.BUILD_INFO["cuda"]), reason="CUDA build")
    @pytest.mark.parametrize("backend, warns", (("", 1), ("cpu", 0)))
    def test_a_cpu_library_under_a_cuda_torch_says_so_once(self, backend, warns):
        code = (
            "import torch, warnings; torch.version.cuda = '13.0';"
            "warnings.simplefilter('always'); import moe_ext; moe_ext.MoE(4, 4, 2, 1)"
        )
        done = python("-c", code, MOE_EXT_BACKEND=backend)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("built for the CPU alone, and this torch has CUDA 13.0") == warns
        assert done.stderr.count("export MOE_EXT_BUILD=cuda") == warns

    @needs_ops
    def test_a_device_without_kernels(self, monkeypatch):
        x, weight = torch.randn(3, 4).to_sparse(), torch.randn(2, 4)
        with pytest.raises(
            NotImplementedError, match="^router_logits: tensors of the SparseCPU ba"
        ):
            functional.router_logits(x, weight)
        monkeypatch.setattr(functional, "BUILD_INFO", {"cuda": None})
        told = functional._unsupported(
            "Could not run 'moe_ext::topk_route' with arguments from the 'CUDA' backend. This ..."
        )
        assert str(told).startswith(
            "topk_route: the tensors are on a GPU, and moe_ext was built for"
        )
        assert "export MOE_EXT_BUILD=cuda" in str(told)

    def test_a_forced_path_refuses_the_other_devices_tensors(self, monkeypatch):
        monkeypatch.setattr(functional, "BACKEND", "cuda")
        monkeypatch.setattr(functional, "_FORCED", "cuda")
        monkeypatch.setattr(functional, "_OTHER", "cpu")
        x = torch.randn(3, 4, device="cpu")
        with pytest.raises(
            ValueError,
            match="^gather_rows: MOE_EXT_BACKEND=cuda takes tensors on cuda, got one on cpu",
        ):
            functional._call("gather_rows", x, None, None)


class TestBackend:
    def test_an_unknown_name_lists_the_known_ones(self):
        message = import_error(ROOT, MOE_EXT_BACKEND="gpu")
        assert f"must be one of {', '.join(_load.BACKENDS)}, got 'gpu'" in message

    @needs_library
    @pytest.mark.skipif(bool(_load.BUILD_INFO and _load.BUILD_INFO["cuda"]), reason="CUDA build")
    def test_cuda_without_a_cuda_build(self):
        assert "built without CUDA" in import_error(ROOT, MOE_EXT_BACKEND="cuda")

    def test_reference_loads_no_library(self, copied):
        for library in (copied / "moe_ext").glob("_C.*"):
            library.unlink()
        code = (
            "import sys, torch, moe_ext; layer = moe_ext.MoE(8, 16, 4, 2);"
            "x = torch.randn(5, 8, requires_grad=True); layer(x).sum().backward();"
            "assert x.grad.abs().sum() > 0; print(layer.stats()['tokens']);"
            "print('moe_ext._C' in sys.modules, 'moe_ext._ops' in sys.modules)"
        )
        done = python("-c", code, cwd=copied, MOE_EXT_BACKEND="reference")
        assert done.stdout.split() == ["5.0", "False", "False"], done.stderr


class TestDiagnosis:
    def test_passes_and_names_what_an_issue_needs(self, tmp_path):
        done = python("-m", "moe_ext", PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.rstrip().endswith("PASS")
        for name in ("moe_ext", "torch", "python", "library", "backend", "cpu", "self-test"):
            assert f"\n{name} " in f"\n{done.stdout}"
        assert torch.__version__ in done.stdout

    def test_a_wrong_kernel_fails_it(self):
        code = (
            "import sys, torch, moe_ext.functional as f; from moe_ext import __main__;"
            "right = f.weighted_combine;"
            "f.weighted_combine = lambda *a, **k: right(*a, **k) * 1.001; sys.exit(__main__.main())"
        )
        done = python("-c", code)
        assert done.returncode == 1
        assert done.stdout.rstrip().endswith("FAIL")
        assert "weighted_combine" in done.stdout and "OFF" in done.stdout

    @needs_library
    def test_tells_a_misfit_that_does_not_load(self, copied):
        doctor(copied, torch="2.9.1")
        done = python("-m", "moe_ext", cwd=copied, MOE_EXT_BACKEND="")
        assert "misfit      it was built with torch 2.9.1" in done.stdout, done.stderr
        assert "not loaded  moe_ext: " in done.stdout and "Rebuild it: " in done.stdout
        assert done.returncode == 1 and done.stdout.rstrip().endswith("FAIL")

    def test_tests_every_device(self, monkeypatch, capsys):
        tested = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(_load, "BACKEND", None)
        monkeypatch.setattr(__main__, "facts", lambda: ())
        monkeypatch.setattr(
            __main__, "report", lambda *call: tested.append(call) or len(tested) < 6
        )
        assert __main__.main() == 1
        assert [device for _, device in tested] == ["cpu"] * 2 + ["cuda:0"] * 2 + ["cuda:1"] * 2
        monkeypatch.setattr(_load, "BACKEND", "cuda")
        assert __main__.devices() == ["cuda:0", "cuda:1"]


LAYERS = {
    "plain": dict(),
    "dropless": dict(capacity_factor=None, activation="relu"),
    "deepseek": dict(
        score_function="sigmoid", n_group=2, topk_group=1, group_score="top2_sum",
        score_correction_bias=True, routed_scaling_factor=2.5, shared_expert_intermediate_size=16,
    ),
    "sequence": dict(capacity_scope="sequence", drop_policy="probs", bias=True, gate_bias=True),
    "float32 router": dict(router_dtype=torch.float32, drop_policy="token"),
}  # fmt: skip


class TestCompare:
    @pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_a_right_layer_is_right_in_every_stage(self, options, dtype):
        layer = moe_ext.MoE(32, 24, 8, 2, dtype=dtype, init_std=0.2, **options)
        x = torch.randn(3, 20, 32).to(dtype)
        mask = torch.zeros(3, 20, dtype=torch.bool)
        mask[:, 16:] = True
        comparison = testing.compare(layer, x, padding_mask=mask)
        assert comparison.ok, str(comparison)
        stages = {row.stage for row in comparison}
        assert stages == {
            "router_logits", "topk_route", "capacity_scatter",
            "grouped_ffn", "weighted_combine", "moe_forward",
        }  # fmt: skip
        assert str(comparison).count("\n") == len(comparison)

    def test_names_the_stage_that_is_off(self, monkeypatch):
        right = functional.grouped_ffn

        def wrong(x, plan, up_proj, down_proj, *args, **kwargs):
            return right(x, plan, up_proj, down_proj * 1.01, *args, **kwargs)

        monkeypatch.setattr(functional, "grouped_ffn", wrong)
        layer = moe_ext.MoE(32, 24, 8, 2)
        comparison = testing.compare(layer, torch.randn(20, 32))
        assert not comparison.ok
        assert {row.stage for row in comparison if not row.ok} == {"grouped_ffn"}
        assert "OFF" in str(comparison)

    def test_names_a_wrong_choice(self, monkeypatch):
        right = functional.topk_route

        def wrong(logits, top_k, **options):
            route = right(logits, top_k, **options)
            if options.get("experts") is None:
                worst = logits.argmin(-1, keepdim=True).int().expand(-1, top_k)
                route = route._replace(experts=worst)
            return route

        monkeypatch.setattr(functional, "topk_route", wrong)
        comparison = testing.compare(moe_ext.MoE(32, 24, 8, 2), torch.randn(20, 32))
        assert [(row.stage, row.result) for row in comparison if not row.ok] == [
            ("topk_route", "choice")
        ]

    def test_leaves_the_layer_unchanged(self):
        layer = moe_ext.MoE(32, 24, 8, 2)
        testing.compare(layer, torch.randn(20, 32))
        assert layer.stats()["tokens"] == 0
        assert all(p.grad is None for p in layer.parameters())
