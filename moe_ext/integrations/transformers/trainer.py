"""transformers' Trainer: its logs, its accumulation of gradients, its biases."""

import functools
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..._checks import check_flag
from ...training import set_loss_scale
from .health import RoutingHealth


class RoutingCallback(TrainerCallback):
    """`RoutingHealth` in transformers' Trainer, and the scale of the router's losses.

        Trainer(..., callbacks=[RoutingCallback(bias_update_rate=1e-3)])

    Biases move after every optimizer step. Every training log gets the numbers of
    `RoutingHealth.summary` as "moe/worst_entropy" and so on, and every log of an evaluation those
    seen in it as "eval_moe/..."; so do the trackers of `report_to` and
    `trainer.state.log_history`. The losses that `moe_ext.MoE` injects are divided by
    `gradient_accumulation_steps`, and under float16 follow the GradScaler.

    Args:
        all_layers: also log every number of every layer, as "moe/<name>/<number>".
        **options: of `RoutingHealth`.
    """

    def __init__(self, *, all_layers: bool = False, **options: Any):
        self.all_layers = check_flag("RoutingCallback", "all_layers", all_layers)
        self.options = options
        self.health = None
        install()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.health = RoutingHealth(model, **self.options)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        scaler = getattr(optimizer, "scaler", None)  # accelerate's, in float16
        scale = 1.0 if scaler is None else scaler.get_scale()
        set_loss_scale(model, scale / args.gradient_accumulation_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.health.update_biases()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.health is None or not logs:
            return
        is_evaluation = any(key.startswith("eval_") for key in logs)
        stats = self.health.check(training=not is_evaluation)
        numbers = self.health.summary(stats)  # none before the run's summary
        if numbers and self.all_layers:
            for name, of_layer in stats.items():
                numbers |= {f"{name}/{key}": value for key, value in of_layer.items()}
        prefix = "eval_moe" if is_evaluation else "moe"
        numbers = {f"{prefix}/{key}": value for key, value in numbers.items()}
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)


def install():
    """Has a Trainer call `RoutingCallback.on_log` first, once.

    It calls its trackers before `callbacks=`, and each of them sends what it is given at once.
    """
    if not hasattr(CallbackHandler.on_log, "before_moe_ext"):
        CallbackHandler.on_log = _numbers_first(CallbackHandler.on_log)


def _numbers_first(call_all):
    @functools.wraps(call_all)
    def on_log(self, args, state, control, logs, *rest, **kwargs):
        for callback in self.callbacks:
            if isinstance(callback, RoutingCallback):
                callback.on_log(args, state, control, logs=logs)
        return call_all(self, args, state, control, logs, *rest, **kwargs)

    on_log.before_moe_ext = call_all
    return on_log
