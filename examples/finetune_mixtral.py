"""Fine-tunes a small Mixtral with LoRA on its experts: transformers and PEFT, on moe_ext.

    python examples/finetune_mixtral.py
    python examples/finetune_mixtral.py --data my_texts/ --finetune-data other_texts/

A byte-level MixtralForCausalLM is trained from scratch on the Python standard library and
saved; reloaded with experts_implementation="moe_ext"; and fine-tuned on another kind of text,
torch's C++ headers, through LoRA adapters on its experts alone.

Ends with the losses on both texts before and after, what a step costs on moe_ext and on what
transformers runs by default, the model's own words, and a picture of its routing.
"""

import argparse
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

import plots
from data import load_corpus
from moe_ext.integrations.transformers import RoutingHealth, register
from report import aligned, readable

HEADERS = Path(torch.__file__).parent / "include" / "c10"


def build_model(args):
    config = MixtralConfig(
        vocab_size=256,  # a token is a byte
        hidden_size=args.width,
        intermediate_size=args.expert_width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=args.context,
        output_router_logits=True,  # the loss then includes the routers' balance loss
        router_aux_loss_coef=0.02,
        initializer_range=0.06,  # 0.02 is for models that are wider
        bos_token_id=None,
        eos_token_id=None,
        experts_implementation="moe_ext",
    )
    return MixtralForCausalLM(config)


def add_lora(model, rank):
    """Adapters on both weights of every expert; all else, the routers too, is frozen."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    return get_peft_model(model, config)


def train(model, corpus, steps, lr, args, label):
    """Tokens per second, and the routing's entropy as a list of (step, [that of every layer])."""
    model.train()
    health = RoutingHealth(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.1)
    warmup = max(1, min(100, steps // 8))
    check_every = max(1, steps // 50)
    batches = torch.Generator().manual_seed(args.seed)
    entropy, losses, seconds = [], [], 0.0

    bar = tqdm(total=steps, desc=label, unit="step", disable=args.quiet)
    for step in range(1, steps + 1):
        started = time.perf_counter()
        for group in optimizer.param_groups:  # a linear warm-up, then linearly down to 5 %
            group["lr"] = lr * min(1.0, step / warmup) * (1 - 0.95 * (step - 1) / steps)
        tokens, _ = corpus.batch(args.batch_size, args.context, batches)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds += time.perf_counter() - started

        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"{label}: the loss is {losses[-1]} at step {step}; lower its rate")
        if step % check_every == 0 or step == steps:
            # check() warns of a router that collapses and of experts that die; in the warm-up
            # routers still look for their balance.
            stats = health.check() if step > warmup else health.stats(reset=True)
            entropy.append((step, [layer["entropy"] for layer in stats.values()]))
            recent = losses[-check_every:]
            bar.set_postfix_str(
                f"loss {sum(recent) / len(recent):.3f},"
                f" entropy {sum(entropy[-1][1]) / len(stats):.3f}",
                refresh=False,
            )
        bar.update()
    bar.close()
    return steps * args.batch_size * args.context / seconds, entropy


@torch.no_grad()
def examine(model, corpus, args):
    """(nats per byte of the validation text, [RoutingHealth's numbers of every layer])."""
    model.eval()
    health = RoutingHealth(model)
    total = count = 0
    batches = corpus.validation_batches(args.validation_windows, args.batch_size, args.context)
    for inputs, targets in batches:
        logits = model(input_ids=inputs, use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return total / count, list(health.stats().values())


IMPLEMENTATIONS = {"moe_ext": "moe_ext", "grouped_mm": "grouped_mm, transformers' default"}


def step_costs(model, corpus, args):
    """{implementation: (CPU milliseconds, MB kept for the backward pass)} of forward and backward.

    They take turns, so that what else the machine does falls on both; the best of five counts.
    """
    model.train()
    tokens, _ = corpus.batch(args.batch_size, args.context, torch.Generator().manual_seed(0))

    def forward(name):
        model.set_experts_implementation(name)
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    kept, times = {}, {name: [] for name in IMPLEMENTATIONS}
    for name in IMPLEMENTATIONS:
        with kept_for_backward(model) as storages:
            loss = forward(name)
        loss.backward()
        kept[name] = sum(storages.values())
    for _ in range(5):
        for name, of_name in times.items():
            started = time.process_time()
            forward(name).backward()
            of_name.append(time.process_time() - started)
    model.zero_grad()
    model.set_experts_implementation("moe_ext")
    return {name: (1000 * min(times[name]), kept[name] / 1e6) for name in IMPLEMENTATIONS}


@contextmanager
def kept_for_backward(model):
    """{address: bytes} of what autograd keeps in this context, parameters aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield storages


def write(model, prompt, length, seed):
    """`length` bytes after the prompt, sampled, as text."""
    if length == 0:
        return ""
    model.eval()
    torch.manual_seed(seed)
    written = model.generate(
        input_ids=prompt[None].long(),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=length,
        do_sample=True,
        temperature=0.8,
        pad_token_id=0,
    )
    return readable(bytes(written[0].tolist()))


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", metavar="FILE_OR_FOLDER", help="default: Python's standard library")
    p.add_argument("--finetune-data", metavar="FILE_OR_FOLDER", help="default: torch's headers")
    p.add_argument("--out", metavar="FOLDER", default="runs/finetune", help="for all it writes")
    p.add_argument("--seed", type=int, default=0, help="of weights, batches and samples (0)")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    p.add_argument("--sample-bytes", type=int, default=200, metavar="N", help="0: no sample (200)")
    p.add_argument("--lr", type=float, default=4e-3, help="peak rate of the training (4e-3)")
    p.add_argument("--finetune-lr", type=float, default=4e-3, help="of the adapters (4e-3)")
    sizes = p.add_argument_group("sizes")
    for name, (default, text) in SIZES.items():
        sizes.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    args = p.parse_args(argv)
    for name in SIZES:
        value = getattr(args, name.replace("-", "_"))
        if value < 1:
            p.error(f"--{name} must be positive, got {value}")
    for name in ("lr", "finetune-lr"):
        value = getattr(args, name.replace("-", "_"))
        if not (0 < value < math.inf):
            p.error(f"--{name} must be positive, got {value}")
    if args.sample_bytes < 0:
        p.error(f"--sample-bytes must be 0 or more, got {args.sample_bytes}")
    if args.width % (2 * args.heads):
        p.error(f"--width must be a multiple of 2 x --heads, got {args.width} and {args.heads}")
    if args.top_k > args.experts:
        p.error(f"--top-k must be at most --experts, got {args.top_k} of {args.experts}")
    return args


SIZES = {
    "steps": (800, "optimizer steps from scratch"),
    "finetune-steps": (200, "optimizer steps of the adapters"),
    "rank": (8, "of the adapters"),
    "batch-size": (4, "sequences a step"),
    "context": (256, "bytes a sequence"),
    "width": (128, "hidden size"),
    "layers": (2, "blocks"),
    "heads": (4, "attention heads"),
    "expert-width": (256, "intermediate size of an expert"),
    "experts": (32, "experts a layer"),
    "top-k": (4, "experts a token"),
    "validation-windows": (128, "sequences of each text to validate on"),
}


def main(argv=None):
    args = parse(argv)
    out = Path(args.out)
    try:
        old = load_corpus(args.data, args.context)
        new = load_corpus(args.finetune_data or HEADERS, args.context, "--finetune-data")
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"finetune_mixtral.py: {error}")
    new.description = new.description.replace(str(HEADERS), "torch's C++ headers")
    print(f"Text: {old.description}; then {new.description}.")

    logging.disable_progress_bar()  # of saving and loading
    register()
    torch.manual_seed(args.seed)
    model = build_model(args)
    speed, entropy = train(model, old, args.steps, args.lr, args, "from scratch")
    size = sum(p.numel() for p in model.parameters())
    model.save_pretrained(out / "base")

    model = AutoModelForCausalLM.from_pretrained(out / "base", experts_implementation="moe_ext")
    before = [examine(model, text, args) for text in (old, new)]
    prompt = new.validation[:40]
    samples = {"before": write(model, prompt, args.sample_bytes, args.seed)}

    model = add_lora(model, args.rank)
    tuned_speed, tuned_entropy = train(
        model, new, args.finetune_steps, args.finetune_lr, args, "LoRA"
    )
    tuned_size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(out / "lora")
    after = [examine(model, text, args) for text in (old, new)]
    samples["after"] = write(model, prompt, args.sample_bytes, args.seed)

    rows = [("nats per byte of", "the old text", "the new", "trained parameters", "tokens/s")]
    for label, exams, trained, rate in (
        ("trained from scratch", before, size, speed),
        (f"and with LoRA, rank {args.rank}", after, tuned_size, tuned_speed),
    ):
        losses = [f"{loss:.3f}" for loss, _ in exams]
        rows.append((label, *losses, f"{trained:,}", f"{rate:,.0f}"))
    print("\n" + aligned(rows))

    costs = step_costs(model, new, args)
    rows = [("a step of LoRA", "CPU ms", "MB kept for backward")]
    for name, (milliseconds, megabytes) in costs.items():
        rows.append((IMPLEMENTATIONS[name], f"{milliseconds:.0f}", f"{megabytes:.1f}"))
    print("\n" + aligned(rows))
    time_share, memory_share = (a / b for a, b in zip(costs["moe_ext"], costs["grouped_mm"]))
    print(f"\nmoe_ext keeps {memory_share:.0%} of the bytes, in {time_share:.0%} of the CPU time.")

    if args.sample_bytes:
        for moment, text in samples.items():
            print(f"\n---- what it writes {moment} fine-tuning " + "-" * 30 + f"\n{text}")

    plots.draw_finetuning(
        [text.description.partition(" (")[0] for text in (old, new)],
        {
            f"{moment} fine-tuning": [stats for _, stats in exams]
            for moment, exams in (("before", before), ("after", after))
        },
        [entropy, tuned_entropy],
        out / "routing.png",
    )
    print()
    for path in (out / "base", out / "lora", out / "routing.png"):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
