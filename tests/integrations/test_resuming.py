"""A Trainer that resumes, or takes the best checkpoint at the end, has all of its weights."""

import warnings

import pytest
import torch

import moe_ext
from support.oracle import bits_equal

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_blocks import jetmoe, switch  # noqa: E402
from test_saving import SMALL, llama  # noqa: E402

from moe_ext.integrations.transformers import register, replace, resuming  # noqa: E402


def mixtral(**options):
    register()
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, **options)
    return transformers.MixtralForCausalLM(config)


def bfloat16_with_float32_routers():
    model = mixtral().bfloat16()
    for layer in model.model.layers:
        layer.mlp.gate.float()
        layer.mlp.gate.register_forward_pre_hook(lambda gate, args: args[0].float())
    return model


def replaced(model):
    replace(model)
    return model


def swapped(model, **options):
    moe_ext.replace_ffn(model, 4, **options)
    return model


def qwen2_moe():
    """Experts of transformers in one layer, of ours in the other."""
    config = transformers.Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
        shared_expert_intermediate_size=8, mlp_only_layers=[0],
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


MODELS = {
    "mixtral": mixtral,
    "mixtral on moe_ext": lambda: mixtral(experts_implementation="moe_ext"),
    "mixtral in two dtypes": bfloat16_with_float32_routers,
    "mixtral, tied": lambda: mixtral(tie_word_embeddings=True),
    "switch after replace": lambda: replaced(switch()),
    "jetmoe after replace": lambda: replaced(jetmoe()),
    "llama after replace_ffn": lambda: swapped(llama()),
    "qwen2_moe after replace_ffn": lambda: swapped(qwen2_moe(), match="*.0.mlp"),
}


class AtTheStart(transformers.TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.step = state.global_step
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}


def trainer(model, folder, max_steps=2):
    args = transformers.TrainingArguments(
        str(folder), max_steps=max_steps, save_steps=2, per_device_train_batch_size=2,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    ids = torch.randint(3, 50, (16, 8))
    data = [dict(input_ids=row, labels=row) for row in ids]
    return transformers.Trainer(model, args, train_dataset=data, callbacks=[AtTheStart()])


def start_of(run):
    return next(c for c in run.callback_handler.callbacks if isinstance(c, AtTheStart))


@pytest.mark.parametrize("name", MODELS)
def test_resumes_from_the_weights_of_the_checkpoint(name, tmp_path):
    saved = MODELS[name]()
    trainer(saved, tmp_path).train()
    model = MODELS[name]()  # of other random weights
    run = trainer(model, tmp_path, max_steps=3)
    parameters = dict(model.named_parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "moe_ext: the Trainer")
        run.train(resume_from_checkpoint=True)
    start = start_of(run)
    assert start.step == 2 and start.weights.keys() == dict(saved.named_parameters()).keys()
    for parameter_name, parameter in saved.named_parameters():
        assert bits_equal(start.weights[parameter_name], parameter.detach()), parameter_name
    # The same parameters as before, and the optimizer trained them.
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert any(not bits_equal(start.weights[n], p.detach()) for n, p in parameters.items())


def test_takes_the_best_checkpoint(tmp_path):
    saved = mixtral()
    trainer(saved, tmp_path).train()
    run = trainer(mixtral(), tmp_path)
    run.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    run._load_best_model()
    loaded = run.model.state_dict()
    assert all(bits_equal(loaded[name], t) for name, t in saved.state_dict().items())


def test_the_config_stays_as_it_is(tmp_path):
    trainer(mixtral(), tmp_path).train()
    model = mixtral()
    run = trainer(model, tmp_path)
    before = model.config.to_dict(), model.config.name_or_path
    run._load_from_checkpoint(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (model.config.to_dict(), model.config.name_or_path) == before


class Odd(transformers.MixtralForCausalLM):
    """Not built from a config alone."""

    def __init__(self, config, number):
        super().__init__(config)


def test_warns_of_what_it_cannot_restore(tmp_path):
    trainer(mixtral(), tmp_path).train()
    model = Odd(mixtral().config, 3)
    folder = str(tmp_path / "checkpoint-2")
    before = model.model.layers[0].mlp.experts.down_proj.clone()
    with pytest.warns(
        UserWarning, match=r"did not restore 6 tensors .*from_pretrained raised TypeE"
    ):
        trainer(model, tmp_path)._load_from_checkpoint(folder)
    assert bits_equal(model.model.layers[0].mlp.experts.down_proj, before)


def test_warns_of_what_the_checkpoint_lacks(tmp_path):
    trainer(llama(), tmp_path).train()
    model = swapped(llama())
    before = model.model.layers[0].mlp.experts.down_proj.clone()
    with pytest.warns(UserWarning, match="did not restore 6 tensors .*it has no such tensors"):
        trainer(model, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert bits_equal(model.model.layers[0].mlp.experts.down_proj, before)


def test_installed_once():
    resuming.install()
    assert not hasattr(transformers.Trainer._load_from_checkpoint.before_moe_ext, "before_moe_ext")
