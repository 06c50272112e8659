"""One run: which feed-forward the model has, how it trains, what is recorded."""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import moe_ext
from data import load_corpus
from model import SwiGLU, Transformer
from report import Result, readable


@dataclass
class Variant:
    """One way to build the feed-forward; `moe` (arguments of MoE) is None for the dense one."""

    label: str
    shows: str
    moe: dict | None = None
    shared: float = 0.0  # of the width that a token passes through, a shared expert's part


MOE = dict(capacity_factor=None, aux_loss_coef=0.01)
LOSS_FREE = dict(score_function="sigmoid", bias_update_rate=0.002, aux_loss_coef=0.0)
# All after `moe` differ from it in one thing; `moe_equal_time`, in train_lm.py, in its steps.
VARIANTS = {
    "dense": Variant("dense", "the model to beat"),
    "moe": Variant("MoE", "balance loss 0.01, no capacity limit", MOE),
    "moe_equal_time": Variant(
        "MoE in equal time", "as many steps as take the dense model's CPU seconds", MOE
    ),
    "unbalanced": Variant(
        "no balance loss", "nothing balances the experts", MOE | dict(aux_loss_coef=0.0)
    ),
    "loss_free": Variant(
        "loss-free balancing", "a bias on the choice balances instead", MOE | LOSS_FREE
    ),
    "capacity_1": Variant(
        "capacity 1.0", "no slack: an expert's overflow is dropped", MOE | dict(capacity_factor=1.0)
    ),
    "capacity_1.25": Variant(
        "capacity 1.25", "a quarter of slack, the layer's default", MOE | dict(capacity_factor=1.25)
    ),
    "shared": Variant("shared expert", "half of the width serves every token", MOE, shared=0.5),
}


def build_model(variant, args):
    def make_ffn():
        if variant.moe is None:
            return SwiGLU(args.width, args.ffn_width)
        # The shared expert and top_k routed ones are together as wide as the dense FFN.
        shared = round(args.ffn_width * variant.shared)
        return moe_ext.MoE(
            args.width,
            (args.ffn_width - shared) // args.top_k,
            num_experts=args.experts,
            top_k=args.top_k,
            shared_expert_intermediate_size=shared,
            **variant.moe,
        )

    return Transformer(args.width, args.layers, args.heads, args.context, make_ffn)


def start_process(lock, places):
    """Of those that train side by side: one thread each, for models this small gain little by more."""
    global place
    torch.set_num_threads(1)
    tqdm.set_lock(lock)
    place = places.get()  # its line on the terminal


def train(name, seed, rate, steps, args):
    """The Result of one run. The seed fixes weights, batches and losses."""
    variant = VARIANTS[name]
    corpus = load_corpus(args.data, args.context)
    torch.manual_seed(seed)
    model = build_model(variant, args)
    result = Result(name, variant.label, seed, rate, *model.parameters_total_and_active())
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    warmup = max(1, min(100, steps // 8))
    batches = torch.Generator().manual_seed(seed)
    record_every, validate_every = max(1, steps // 100), max(1, steps // 20)
    seconds, cpu_seconds, losses = 0.0, 0.0, []

    label = f"{variant.label}, rate {rate:g}, seed {seed}"
    bar = tqdm(total=steps, desc=label, unit="step", disable=args.quiet, position=place)
    for step in range(1, steps + 1):
        started, cpu_started = time.perf_counter(), time.process_time()
        for group in optimizer.param_groups:  # a linear warm-up, then linearly down to 5 %
            decay = 1 - 0.95 * (step - 1) / steps
            group["lr"] = rate * min(1.0, step / warmup) * decay
        inputs, targets = corpus.batch(args.batch_size, args.context, batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()  # here the layers add the gradient of their balance losses
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        moe_ext.update_router_biases(model)  # of the layers that balance without a loss
        losses.append(loss.item())
        seconds += time.perf_counter() - started
        cpu_seconds += time.process_time() - cpu_started

        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"{label}: the loss is {losses[-1]} at step {step}; lower --lr")
        if step % record_every == 0 or step == steps:
            result.train_loss.append((step, sum(losses) / len(losses)))
            losses.clear()
            record_routing(model, step, result)
        tokens = step * args.batch_size * args.context
        result.tokens_per_second = tokens / seconds
        result.tokens_per_cpu_second = tokens / cpu_seconds
        if step % validate_every == 0 or step == steps:
            result.validation_loss.append((step, validation_loss(model, corpus, args)))
        bar.set_postfix_str(describe(result), refresh=False)
        bar.update()
    bar.close()
    result.sample = readable(model.generate(b"def ", args.sample_bytes))
    return result


def record_routing(model, step, result):
    """What the layers' routers did since the last reading."""
    stats = [layer.stats(reset=True) for layer in model.moe_layers()]
    if stats:
        result.drop_rate.append((step, sum(s["drop_rate"] for s in stats) / len(stats)))
        result.entropy.append((step, sum(s["entropy"] for s in stats) / len(stats)))
        result.load.append((step, [(s["load"] / s["load"].sum()).tolist() for s in stats]))


@torch.no_grad()
def validation_loss(model, corpus, args):
    model.eval()  # an MoE layer drops nothing in eval mode
    total = count = 0
    batches = corpus.validation_batches(args.validation_windows, args.batch_size, args.context)
    for inputs, targets in batches:
        logits = model(inputs)
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    model.train()
    for layer in model.moe_layers():
        layer.stats(reset=True)  # the curves are about training
    return total / count


def describe(result):
    """The progress bar's right end."""
    parts = [f"{result.tokens_per_second:,.0f} tokens/s"]
    if result.train_loss:
        parts.insert(0, f"loss {result.train_loss[-1][1]:.3f}")
    if result.load:
        parts.append(f"drop {result.drop_rate[-1][1]:.1%}, entropy {result.entropy[-1][1]:.3f}")
    return ", ".join(parts)
