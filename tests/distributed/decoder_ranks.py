"""Run on 2 ranks: a decoder of transformers under DDP, FSDP2 and ZeRO 1 to 3, whose replicas follow rows of their own,
or train on sequences that they draw, against one process; rank 0 prints the largest difference of any parameter, by
what trained it, as JSON.

    mpirun -n 2 python -m tests.distributed.decoder_ranks
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import d2ft_hpc
from d2ft_hpc.engines.engine import evaluated
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.launch import detect
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.planning.samples import SampleOptions
from d2ft_hpc.selection.build import selection_of

DEPTH, GROUPS, SLOTS, STEPS, RATE = 3, 3, 2, 3, 0.5
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 6,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 12,
}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "Llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)).train()


def plan_of(step: int, replicas: int) -> SkipPlan:
    """Of 2 replicas' rows in any case."""
    rows = np.random.default_rng(step).integers(0, 3, (2 * SLOTS, DEPTH, GROUPS)).astype(np.uint8)
    rows[step, step] = 0  # a block that one replica skips
    rows[:2, (step + 1) % DEPTH] = 0  # one that no replica runs
    if step:  # in one micro-batch a replica trains its last block alone, or none
        rows[0] = 0
        rows[0, -1] = 2 * (step == 1)
    return SkipPlan(rows, replicas=replicas)


def text(step: int, row: int) -> Tensor:
    return torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(100 * step + row))


def one_process(kind: str, embeddings: Any) -> dict[str, Tensor]:
    model = make(kind)
    executor = attach(model, embeddings=embeddings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        executor.activate(plan_of(step, replicas=1), replica=0)
        for row in range(2 * SLOTS):
            with executor.micro_batch(row):
                (model(input_ids=text(step, row), labels=text(step, row)).loss / (2 * SLOTS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def spread(way: str, model: Any) -> Any:
    """The model under DDP or FSDP2."""
    if way == "DDP":
        return DistributedDataParallel(model)
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def reducing(outer: Any, is_last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch: gradients are reduced in a batch's last one alone."""
    if not isinstance(outer, DistributedDataParallel):
        outer.set_requires_gradient_sync(is_last)
        return nullcontext()
    return nullcontext() if is_last else outer.no_sync()


def by_torch(way: str, kind: str, embeddings: Any, rank: int) -> Iterator[tuple[str, Tensor]]:
    model = make(kind)
    executor = attach(model, embeddings=embeddings)
    outer = spread(way, model)
    d2ft_hpc.prepare(outer, executor)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        executor.activate(plan_of(step, replicas=2), replica=rank)
        for slot in range(SLOTS):
            ids, is_last = text(step, 2 * slot + rank), slot == SLOTS - 1
            with reducing(outer, is_last), executor.micro_batch(slot):
                output = outer(input_ids=ids, labels=ids, output_hidden_states=step == STEPS - 1)
                (output.loss / SLOTS).backward()
            assert output.hidden_states is None or len(output.hidden_states) == DEPTH + 1
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        yield name, whole(parameter)


def whole(parameter: nn.Parameter) -> Tensor:
    data = parameter.detach()
    return data.full_tensor() if isinstance(data, DTensor) else data


def by_zero(stage: int, kind: str, embeddings: Any, rank: int) -> Iterator[tuple[str, Tensor]]:
    engine = zero_engine(make(kind), stage, 4, {"planner": "joint", "embeddings": embeddings})
    for step in range(STEPS):
        engine.d2ft.activate(plan_of(step, replicas=2))
        for slot in range(SLOTS):
            ids = text(step, 2 * slot + rank)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
    return gathered(engine, stage)


def zero_engine(model: Any, stage: int, samples: int, section: dict[str, Any]) -> Any:
    engine, *_ = d2ft_hpc.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": samples,
            "gradient_accumulation_steps": SLOTS,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "d2ft": section,
        },
    )
    return engine


def gathered(engine: Any, stage: int) -> Iterator[tuple[str, Tensor]]:
    import deepspeed

    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            yield name, parameter.detach().clone()


def padded(step: int, row: int) -> dict[str, Tensor]:
    """8 sequences, of which planner `samples` draws 4 within 0.6, on the right of which is nothing."""
    ids = torch.cat([text(step, row), text(step + STEPS, row)])
    mask = torch.arange(12) < 5 + torch.arange(8)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.where(mask, -100)}


def one_process_drawing(embeddings: Any, *, by_batch: bool) -> dict[str, Tensor]:
    """by_batch: all micro-batches of a replica are drawn from together, else one by one."""
    model = make("Llama")
    attach(model, embeddings=embeddings)
    selections = [
        selection_of(SampleOptions(), model.model, (12,), seed=0, replica=replica) for replica in range(2)
    ]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        for replica, selection in enumerate(selections):
            selection.scorer.bind(partial(evaluated, model))
            batch = [padded(step, 2 * slot + replica) for slot in range(SLOTS)]
            if by_batch:
                drawn = selection(batch, step, 0.5)
            else:
                drawn = [selection([each], step * SLOTS + slot, 0.5)[0] for slot, each in enumerate(batch)]
            for each in drawn:
                (model(**each).loss / (2 * SLOTS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def drawing_by_torch(way: str, embeddings: Any, rank: int) -> Iterator[tuple[str, Tensor]]:
    model = make("Llama")
    d2ft = d2ft_hpc.attach(model, 0.6, planner="samples", micro_batches=SLOTS, embeddings=embeddings)
    outer = spread(way, model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        for slot in range(SLOTS):
            batch, is_last = d2ft.choose(padded(step, 2 * slot + rank)), slot == SLOTS - 1
            with reducing(outer, is_last):
                (outer(**batch).loss / SLOTS).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(d2ft.measured_share - d2ft.promised_share) < 0.01
    for name, parameter in model.named_parameters():
        yield name, whole(parameter)


def drawing_by_zero(stage: int, embeddings: Any, rank: int) -> Iterator[tuple[str, Tensor]]:
    engine = zero_engine(make("Llama"), stage, 8, {"planner": "samples", "embeddings": embeddings})
    for step in range(STEPS):
        for batch in engine.d2ft.choose([padded(step, 2 * slot + rank) for slot in range(SLOTS)]):
            engine.backward(engine(**batch).loss)
            engine.step()
    return gathered(engine, stage)


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    rank = detect().rank

    def compare(expected: dict[str, Tensor], trained: Iterator[tuple[str, Tensor]]) -> float:
        differences = [(parameter - expected[name]).abs().max() for name, parameter in trained]
        return float(torch.stack(differences).max())

    for kind, embeddings in (("Llama", "frozen"), ("Qwen3, tied", "trained")):
        expected = one_process(kind, embeddings)
        moved = [(expected[name] - p).abs().max() for name, p in make(kind).named_parameters()]
        assert max(moved) > 0.01
        trained = {f"ZeRO {stage}": by_zero(stage, kind, embeddings, rank) for stage in (1, 2, 3)}
        trained |= {way: by_torch(way, kind, embeddings, rank) for way in ("DDP", "FSDP2")}
        for way, parameters in trained.items():
            found[f"{way}, {kind}"] = compare(expected, parameters)
    expected = one_process_drawing("frozen", by_batch=True)
    for stage in (1, 3):
        found[f"ZeRO {stage}, drawing"] = compare(expected, drawing_by_zero(stage, "frozen", rank))
    for way, embeddings in (("DDP", "trained"), ("FSDP2", "frozen")):
        expected = one_process_drawing(embeddings, by_batch=False)
        found[f"{way}, drawing"] = compare(expected, drawing_by_torch(way, embeddings, rank))
    if rank == 0:
        print("RESULTS " + json.dumps(found))


if __name__ == "__main__":
    main()
