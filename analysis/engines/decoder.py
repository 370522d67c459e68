"""Step time of a Llama-type decoder of random weights under plans over its own compiled dense training, in turns:

    python -m analysis.engines.decoder --json

Each contender is a training loop as users write it, with a model of its own: micro-batches of random tokens, forward
and backward, then one step of AdamW. Dense training is the faster of the model compiled as a whole and compiled by
block; in the latter attention has no mask, as in the loops with D2FT, while transformers makes one when all is
compiled. Loss and head of the vocabulary are compiled in all of them, and embeddings are frozen in all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import d2ft_hpc
from d2ft_hpc.bench.turns import Ratio, alternate
from d2ft_hpc.command import share, whole_number

PLANNERS = ("static", "samples")

Batch = list[dict[str, Tensor]]
Step = Callable[[], object]


def decoder(options: argparse.Namespace, device: torch.device) -> Any:
    """Heads of 64 channels, four for each key and value, hidden units four times the width: Llama 3.2's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = options.width // 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=4 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            max_position_embeddings=options.tokens,
            use_cache=False,
        )
    )
    model.model.embed_tokens.requires_grad_(False)
    return model.to(device, torch.bfloat16).train()


def batch_of(options: argparse.Namespace, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (options.micro_batches, options.samples, options.tokens)
    ids = torch.randint(3, options.vocabulary, shape, generator=generator).to(device)
    return [{"input_ids": each, "labels": each} for each in ids]


def loop(model: Any, backbone: Any, batch: Batch, choose: Callable[[Any], Any] = lambda given: given) -> Step:
    """backbone: what computes the model's last hidden states. choose: what trains of a micro-batch."""

    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = model.lm_head(hidden[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    head = torch.compile(loss_of, dynamic=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        for given in batch:
            inputs = dict(choose(given))
            labels = inputs.pop("labels")
            head(backbone(**inputs)[0], labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def contenders(
    options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Step], dict[str, Any], int]:
    """Steps by name, what tells the plan of those that have one, and the number of a model's parameters."""
    batch = batch_of(options, device)
    whole, by_block = decoder(options, device), decoder(options, device)
    for layer in by_block.model.layers:
        layer.compile(dynamic=False)
    steps = {
        "dense, compiled whole": loop(whole, torch.compile(whole.model, dynamic=False), batch),
        "dense, compiled by block": loop(by_block, by_block.model, batch),
    }
    plans: dict[str, Any] = {}
    for planner in PLANNERS:
        model = decoder(options, device)
        settings: dict[str, Any] = {"compile": True, "cuda_graphs": options.cuda_graphs}
        d2ft = plans[planner] = d2ft_hpc.attach(
            model, options.compute_budget, planner=planner, micro_batches=options.micro_batches, **settings
        )
        is_chosen = planner == "samples"
        steps[planner] = loop(model, model.model, batch, d2ft.choose if is_chosen else lambda given: given)
    return steps, plans, sum(parameter.numel() for parameter in whole.parameters())


def compare(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, plans, parameters = contenders(options, device)
    seconds = alternate(steps, options.steps, device)
    dense = min(
        (name for name in steps if name not in plans), key=lambda name: float(np.median(seconds[name]))
    )
    return {
        **{name: value for name, value in vars(options).items() if name != "json"},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": parameters,
        "dense": dense,
        "seconds": {name: float(np.median(of_name)) for name, of_name in seconds.items()},
        "over_dense": {name: asdict(Ratio.of(seconds[name], seconds[dense])) for name in plans},
        "reports": {name: str(plan.report()) for name, plan in plans.items()},
    }


def report(found: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            f"Llama of {found['parameters'] / 1e9:.2f} billion parameters, {found['micro_batches']} x "
            f"{found['samples']} x {found['tokens']} tokens a step, bf16, {found['device']}",
            *(f"{name:28s}{1e3 * seconds:10.1f} ms" for name, seconds in found["seconds"].items()),
            *(
                f"{name} over {found['dense']}: {Ratio(**ratio)}"
                for name, ratio in found["over_dense"].items()
            ),
            *(f"{name}: {text}" for name, text in found["reports"].items()),
        ]
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="decoder", description=__doc__)
    made.add_argument("--layers", type=whole_number(1), default=16)
    made.add_argument("--width", type=whole_number(64), default=2048, help="a multiple of 64")
    made.add_argument("--vocabulary", type=whole_number(4), default=32000)
    made.add_argument("--tokens", type=whole_number(2), default=2048, help="of a sequence")
    made.add_argument("--samples", type=whole_number(1), default=2, help="sequences of a micro-batch")
    made.add_argument("--micro-batches", type=whole_number(1), default=4, help="of a step")
    made.add_argument("--steps", type=whole_number(2), default=20, help="measured steps of each")
    made.add_argument("--compute-budget", type=share(), default=0.6)
    made.add_argument("--cuda-graphs", action="store_true", help="blocks launched as CUDA graphs")
    made.add_argument("--json", action="store_true", help="end with one line of JSON")
    return made


def main() -> int:
    options = parser().parse_args()
    found = compare(options)
    print(report(found))
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
