"""transformers' own model tests on moe_ext, and on what transformers runs by default.

    python tests/integrations/run_transformers_tests.py     writes results/transformers_tests.md

Takes tests/test_modeling_common.py from the source distribution of the installed version, and
runs ModelTesterMixin over a few tiny models twice: as it is, and with moe_ext's function in
the place of "grouped_mm" (the default) and "batched_mm". A test that fails on moe_ext alone
fails the run. Needs a package index, and a few minutes.

The source distribution leaves out the exporters' and the generation tests
(tests/exporters, tests/generation), so those mixins stay empty.
"""

import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "transformers_tests"
RESULTS = HERE / "results" / "transformers_tests.md"
VERSION = importlib.metadata.version("transformers")

# What their configs have beside tiny_models' own: the tests want attention's cache.
MODELS = {
    "mixtral.MixtralExperts": dict(),
    "qwen3_moe.Qwen3MoeExperts": dict(),
    "olmoe.OlmoeExperts": dict(),
    "deepseek_v3.DeepseekV3Experts": dict(),
    "gpt_oss.GptOssExperts": dict(),
    "nemotron_h.NemotronHExperts": dict(layers_block_type=["attention", "moe"]),
    "inkling2.Inkling2Experts": dict(unpadded_vocab_size=64),
}

# What the tests import and the source distribution leaves out.
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
}

CONFTEST = """
import os

calls = 0

if os.environ["MOE_EXT_FORCED"] == "1":
    from transformers.integrations import moe
    from moe_ext.integrations.transformers.experts import experts_forward

    def forced(*args, **kwargs):
        global calls
        calls += 1
        return experts_forward(*args, **kwargs)

    for name in ("grouped_mm", "batched_mm"):
        moe.ALL_EXPERTS_FUNCTIONS.register(name, forced)
        setattr(moe, f"{name}_experts_forward", forced)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"moe_ext calls: {calls}")
"""

MODEL_TEST = """
import sys
import unittest

sys.path[:0] = [{tests!r}, {here!r}]
import tiny_models
import torch
from tests.test_modeling_common import ModelTesterMixin


def config():
    return tiny_models.config({name!r}, **{options!r})


MODEL, CONFIG = tiny_models.model_class({name!r}), config()


class Tester:
    batch_size, seq_length, is_training = 2, 24, True
    hidden_size, num_hidden_layers = CONFIG.hidden_size, CONFIG.num_hidden_layers
    num_attention_heads = CONFIG.num_attention_heads

    def get_config(self):
        return config()

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, CONFIG.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), dict(input_ids=ids, attention_mask=torch.ones_like(ids))


class {model}Test(ModelTesterMixin, unittest.TestCase):
    # Only says that the generation tests are not there.
    test_generation_tester_mixin_inheritance = None

    all_model_classes = (MODEL, type(MODEL(CONFIG).base_model))
    # With a few tokens some expert gets none.
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = Tester()
"""


def prepare():
    """build/transformers_tests/tests, as the mixins want it."""
    tests = BUILD / "tests"
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]
    if not tests.exists():
        source = ["--no-binary", "transformers", "--no-deps", "--no-build-isolation"]
        subprocess.run(
            [*pip, "download", *source, "-d", BUILD, f"transformers=={VERSION}"], check=True
        )
        packages = BUILD / "packages"
        subprocess.run([*pip, "install", "--target", packages, "parameterized"], check=True)
        with tarfile.open(BUILD / f"transformers-{VERSION}.tar.gz") as archive:
            prefix = f"transformers-{VERSION}/"
            members = [m for m in archive if m.name.startswith(f"{prefix}tests/")]
            for member in members:
                member.name = member.name.removeprefix(prefix)
            archive.extractall(BUILD, members, filter="data")
    for name, text in STUBS.items():
        (tests / name).parent.mkdir(exist_ok=True)
        (tests / name).write_text(text)
    (tests / "conftest.py").write_text(CONFTEST)
    for name, options in MODELS.items():
        text = MODEL_TEST.format(
            name=name,
            options=dict(initializer_range=0.02) | options,
            model=name.split(".")[1].removesuffix("Experts"),
            tests=str(HERE.parent),
            here=str(HERE),
        )
        (tests / f"test_{name.split('.')[0]}.py").write_text(text)


def run(name, forced):
    """({test: "passed", "failed" or "skipped"}, calls of our function)."""
    report = BUILD / f"{name}-{forced}.xml"
    paths = (BUILD, ROOT, BUILD / "packages")
    environment = os.environ | dict(
        MOE_EXT_FORCED=str(forced), PYTHONPATH=os.pathsep.join(map(str, paths)), HF_HUB_OFFLINE="1"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["--rootdir", BUILD, f"--junit-xml={report}", f"tests/test_{name.split('.')[0]}.py"]
    output = subprocess.run(command, cwd=BUILD, env=environment, capture_output=True, text=True)
    (BUILD / f"{name}-{forced}.log").write_text(output.stdout + output.stderr)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = (
            "failed"
            if tags & {"failure", "error"}
            else "skipped"
            if "skipped" in tags
            else "passed"
        )
        outcomes[case.get("name")] = outcome
    calls = int(output.stdout.rsplit("moe_ext calls:", 1)[1].split()[0])
    return outcomes, calls


HEAD = f"""# transformers' own model tests on moe_ext

Written by `python tests/integrations/run_transformers_tests.py`: `ModelTesterMixin` of
transformers {VERSION}'s source distribution over tiny models, as it is, and with moe_ext's function
in place of its default, `grouped_mm`, and of `batched_mm`. What is skipped asks for a GPU or a
package, or does not concern the model. The generation and exporter mixins are not in the
source distribution.

| model | tests | skipped | pass on the default | pass on moe_ext | fail on moe_ext alone | fail on the default alone | fail on both | calls of moe_ext |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def having(outcomes, wanted):
    """The tests of that outcome."""
    return {test for test, outcome in outcomes.items() if outcome == wanted}


def row(name):
    """The model's line, and the tests that fail on moe_ext alone."""
    default, _ = run(name, 0)
    ours, calls = run(name, 1)
    assert default.keys() == ours.keys() and calls > 0
    failed, our_failed = (having(run, "failed") for run in (default, ours))
    cells = [name.split(".")[0], len(ours), len(having(ours, "skipped"))]
    cells += [len(having(run, "passed")) for run in (default, ours)]
    regressions = sorted(our_failed - failed)
    for tests in (regressions, failed - our_failed, failed & our_failed):
        cells.append(", ".join(sorted(tests)) or "none")
    return f"| {' | '.join(map(str, [*cells, calls]))} |", regressions


if __name__ == "__main__":
    prepare()
    text, failures = HEAD, []
    for name in MODELS:
        line, regressions = row(name)
        print(line, flush=True)
        text += f"{line}\n"
        failures += regressions
        RESULTS.write_text(text)
    sys.exit(bool(failures))
