"""A small Llama for bytes: pretrained on Python's standard library, fine-tuned on torch's C++ headers.

    python -m analysis.text.train pretrain FOLDER RESULTS.jsonl       # once: weights, and the headers' bytes
    python -m analysis.text.train finetune FOLDER RESULTS.jsonl --contender samples --budget 0.6 --rate 3e-4 --seed 1

Each run adds a line to the results.

Compute is in FLOPs of matrix products and attention that the training loop's steps executed, scoring included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import d2ft_hpc
from d2ft_hpc.command import amount, share, whole_number
from d2ft_hpc.metering import meter

CONTENDERS = ("dense", "fewer_steps", "small_batches", "samples", "static")
END_OF_FILE = b"\0"  # which no text holds
LARGEST_FILE = 2**16
"""Bytes; larger headers, and those of ATen/ops, were written by programs."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- text


def joined(files: Iterable[Path]) -> Tensor:
    """The bytes of different files, uint8 [byte]."""
    contents = dict.fromkeys(file.read_bytes() for file in sorted(files))
    return torch.frombuffer(bytearray(END_OF_FILE.join(contents)), dtype=torch.uint8)


def python_sources() -> Tensor:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in folder.rglob("*.py") if not {"site-packages", "dist-packages"} & {*file.parts})
    return joined(files)


def header_sequences(tokens: int) -> dict[str, Tensor]:
    """torch's C++ headers in three parts, uint8 [sequence, token] each, in random order.

    The part follows from a file's name without digits: vec256_int.h and vec512_int.h, much alike, are in one.
    """
    folder = Path(torch.__file__).parent / "include"
    files = defaultdict(list)
    for file in folder.rglob("*.h"):
        if file.stat().st_size <= LARGEST_FILE and "ATen/ops" not in file.as_posix():
            draw = hashlib.sha256(re.sub(r"\d", "", file.name).encode()).digest()[0] / 256
            files["validation" if draw < 0.1 else "test" if draw < 0.3 else "train"].append(file)
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for part, of_part in files.items():
        text = joined(of_part)
        sequences = text[: len(text) // tokens * tokens].view(-1, tokens)
        parts[part] = sequences[torch.randperm(len(sequences), generator=generator)]
    return parts


# ---- training


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")


def train(
    model: Any,
    batches: Tensor,
    rate: float,
    *,
    micro_batches: int = 1,
    choose: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda given: given,
) -> int:
    """batches: uint8 [step, sequence, token]. choose: what trains of a micro-batch. Returns the FLOPs: those of the
    first step, which may give scores, and those of another one times the number of the others."""
    steps = len(batches)
    warm_up = max(1, steps // 10)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    counted = {}
    model.train()
    for step, batch in enumerate(batches):
        is_counted = step in (0, steps // 2, steps - 1)
        with meter() if is_counted else nullcontext() as metered:
            for part in batch.to(DEVICE).long().chunk(micro_batches):
                with autocast():
                    loss = model(**choose({"input_ids": part, "labels": part})).loss
                (loss / micro_batches).backward()
        if metered is not None:
            counted[step] = metered.flops
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if counted[steps // 2] != counted[steps - 1]:
        raise SystemExit(f"steps differ in their FLOPs: {counted}")
    return counted[0] + (steps - 1) * counted[steps - 1]


@torch.no_grad()
def tested(model: Any, sequences: Tensor) -> tuple[float, float]:
    """Bits a byte, and the share of the next bytes that are the likeliest, over uint8 [sequence, token]."""
    model.eval()
    bits = right = 0.0
    for part in sequences.split(50):
        ids = part.to(DEVICE).long()
        with autocast():
            logits = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
        targets = ids[:, 1:].flatten()
        bits += float(F.cross_entropy(logits, targets, reduction="sum")) / math.log(2)
        right += float((logits.argmax(1) == targets).sum())
    predicted = sequences[:, 1:].numel()
    return bits / predicted, right / predicted


def pretrain(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    text, headers = python_sources(), header_sequences(options.tokens)
    options.folder.mkdir(parents=True, exist_ok=True)
    save_file(headers, options.folder / "headers.safetensors")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=options.width,
            intermediate_size=8 * options.width // 3 // 32 * 32,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads // 2,
            max_position_embeddings=options.tokens,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    ).to(DEVICE)
    starts = torch.randint(len(text) - options.tokens, (options.steps, options.batch, 1))
    began = time.perf_counter()
    flops = train(model, text[starts + torch.arange(options.tokens)], options.rate)
    model.save_pretrained(options.folder)
    sizes = {"python_bytes": len(text), **{f"{part}_sequences": len(its) for part, its in headers.items()}}
    keep(options, model, headers, flops, began, sizes)


def keep(
    options: argparse.Namespace,
    model: Any,
    headers: dict[str, Tensor],
    flops: int,
    began: float,
    more: dict[str, int],
) -> None:
    """Adds the run's line, with `more`, to the results."""
    seconds = time.perf_counter() - began
    found = {part: tested(model, headers[part][: options.tested]) for part in ("validation", "test")}
    line = {
        **{name: value for name, value in vars(options).items() if isinstance(value, str | int | float)},
        **more,
        "flops": flops,
        "bits": {part: round(bits, 5) for part, (bits, _) in found.items()},
        "accuracy": {part: round(accuracy, 5) for part, (_, accuracy) in found.items()},
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with options.results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))


def finetune(options: argparse.Namespace) -> None:
    headers = load_file(options.folder / "headers.safetensors")
    generator = torch.Generator().manual_seed(options.seed)
    model: Any = LlamaForCausalLM.from_pretrained(options.folder).to(DEVICE)
    model.model.embed_tokens.requires_grad_(False)  # as in all that D2FT trains
    train_part = headers["train"]
    if len(train_part) < options.sequences:
        raise SystemExit(f"--sequences {options.sequences}: there are {len(train_part)}")
    own = train_part[torch.randperm(len(train_part), generator=generator)[: options.sequences]]

    contender, budget = options.contender, options.budget
    steps, batch = options.epochs * options.sequences // options.batch, options.batch
    if contender == "fewer_steps":
        steps = int(budget * steps + 1e-9)
    elif contender == "small_batches":
        batch = int(budget * batch + 1e-9)
    epochs = [torch.randperm(len(own), generator=generator) for _ in range(options.epochs)]
    batches = own[torch.cat(epochs)[: steps * batch].view(steps, batch)]

    settings: dict[str, Any] = {}
    plan = None
    if contender in ("samples", "static"):
        micro_batches = options.micro_batches if contender == "static" else 1
        plan = d2ft_hpc.attach(
            model, budget, planner=contender, micro_batches=micro_batches, seed=options.seed
        )
        settings = {"micro_batches": micro_batches}
        if contender == "samples":
            settings["choose"] = plan.choose
    began = time.perf_counter()
    flops = train(model, batches, options.rate, **settings)
    keep(options, model, headers, flops, began, {})
    if plan is not None:
        print(plan.report())


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="train", description=__doc__)
    commands = made.add_subparsers(required=True)
    before = commands.add_parser("pretrain")
    before.set_defaults(run=pretrain, contender="pretrained")
    before.add_argument("--layers", type=whole_number(1), default=8)
    before.add_argument("--width", type=whole_number(8), default=512)
    before.add_argument("--heads", type=whole_number(2), default=8, help="of queries; half as many of keys")
    before.add_argument("--tokens", type=whole_number(8), default=512, help="of a sequence")
    before.add_argument("--steps", type=whole_number(3), default=1500)
    before.add_argument("--batch", type=whole_number(1), default=64)
    before.add_argument("--rate", type=amount, default=1e-3)
    after = commands.add_parser("finetune")
    after.set_defaults(run=finetune)
    after.add_argument("--contender", choices=CONTENDERS, default="dense")
    after.add_argument("--budget", type=share(), default=1.0)
    after.add_argument("--rate", type=amount, default=5e-4)
    after.add_argument("--seed", type=whole_number(0), default=0, help="of the sequences and their order")
    after.add_argument("--sequences", type=whole_number(1), default=2500, help="to train on")
    after.add_argument("--epochs", type=whole_number(1), default=3)
    after.add_argument("--batch", type=whole_number(1), default=25)
    after.add_argument("--micro-batches", type=whole_number(1), default=5, help="of a batch under static")
    for each in (before, after):
        each.add_argument("folder", type=Path, help="of the pretrained model")
        each.add_argument("results", type=Path, help="a line of JSON is added to it")
        each.add_argument("--tested", type=whole_number(1), default=1000, help="sequences at most, of a part")
    return made


def main() -> int:
    options = parser().parse_args()
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
