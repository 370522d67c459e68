"""A simulation, not a measurement: steps on 8 to 4,096 GPUs from what one GPU was measured to compute and what a model
says of messages between many.

    python -m analysis.scaling.simulate            # writes simulated.jsonl and scaling.png, prints the check and tables

A step is what one rank computes (analysis/engines, one H200) and the part of its messages that no computing hides. Two
bounds hold it: nothing is hidden, or all that the computing beside it is long enough for. Nothing here waits for slow
ranks, shares links with other jobs, or reads data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_hpc.planning import Budgets, Devices, GivenShares, PlanProblem, SkipPlan, pose, solve
from d2ft_hpc.planning.placement import in_order
from d2ft_hpc.planning.step_time import StepTime
from d2ft_hpc.planning.token_curve import token_curve

HERE = Path(__file__).parent
MEASURED = HERE.parent / "engines"
GPUS_A_NODE = 8
RANKS = tuple(8 << power for power in range(10))
BACKWARD_SHARE = 2 / 3
"""Of what a rank computes: a backward pass has twice the forward's FLOPs. Assumed of plans as well."""
PARAMETERS = 85_063_690
"""Trainable ones of ViT-B/16, ten classes, frozen embeddings: 340,254,760 bytes in fp32, as counted on two GPUs."""
OF_BLOCKS = 12 * 7_087_872
"""Of them in the blocks, which tensor-parallel ranks share out."""
BLOCKS, HEADS, SLOTS = 12, 12, 2
ACTIVATION_BYTES = 64 * 197 * 768 * 2.0
"""Of a micro-batch of 64 images between blocks, in bf16."""


@dataclass(frozen=True)
class Network:
    """bytes/s: of one GPU's NVLink in one direction; of one network card. cards: of a node. efficiency: share of a link
    that collectives reach. hop_seconds: of one message inside a node, and between nodes."""

    name: str
    nvlink: float = 450e9
    card: float = 50e9
    cards: int = 8
    efficiency: float = 0.8
    hop_seconds: tuple[float, float] = (3.4e-6, 14e-6)

    def bandwidth(self, ranks: int, rings: int = 1) -> float:
        """Bytes/s of each of `rings` equal rings that share the nodes, over so many ranks each."""
        on_one_node = ranks * rings <= GPUS_A_NODE
        return self.efficiency * (
            self.nvlink if on_one_node else min(self.nvlink, self.cards * self.card / rings)
        )

    def latency(self, ranks: int, rings: int = 1) -> float:
        """Of one way through a tree over the GPUs of a node, then over the nodes."""
        inside, between = self.hop_seconds
        nodes = max(ranks * rings // GPUS_A_NODE, 1)
        return inside * math.log2(min(ranks, GPUS_A_NODE // rings)) + between * math.log2(nodes)

    def gather(self, size: float, ranks: int, rings: int = 1) -> float:
        """Seconds of an all-gather, or a reduce-scatter, of `size` bytes in all."""
        sent = (ranks - 1) / ranks * size
        return sent / self.bandwidth(ranks, rings) + self.latency(ranks, rings) if ranks > 1 else 0.0

    def all_reduce(self, size: float, ranks: int, rings: int = 1) -> float:
        return 2 * self.gather(size, ranks, rings)


NETWORKS = (
    Network("8 cards a node"),
    Network("1 card a node", cards=1),
    Network("25 Gbit/s Ethernet", card=3.125e9, cards=1, hop_seconds=(3.4e-6, 50e-6)),
)

ENGINES = ("DDP", "ZeRO 1", "ZeRO 3 / FSDP2")


def messages_of(engine: str) -> list[tuple[str, float, bool]]:
    """What data parallelism sends in a step: the collective, the bytes in all, and whether computing can hide it.

    DDP sums gradients in fp32 with the last micro-batch's backward. ZeRO 1 sums them in bf16 and gathers bf16 weights
    in the optimiser's step. ZeRO 3 and FSDP2 gather bf16 weights for each forward and again for each backward, and
    scatter gradients in fp32 after each.
    """
    if engine.startswith("ZeRO 1"):
        return [("all-reduce", 2.0 * PARAMETERS, True), ("gather", 2.0 * PARAMETERS, False)]
    if engine.startswith("ZeRO 3"):
        return SLOTS * [("gather", size * PARAMETERS, True) for size in (2.0, 2.0, 4.0)]
    return [("all-reduce", 4.0 * PARAMETERS, True)]


def gradient_seconds(engine: str, network: Network, ranks: int) -> tuple[float, float]:
    """Seconds of messages that computing can hide, and of the others."""
    seconds = {True: 0.0, False: 0.0}
    for collective, size, hides in messages_of(engine):
        send = network.all_reduce if collective == "all-reduce" else network.gather
        seconds[hides] += send(size, ranks)
    return seconds[True], seconds[False]


def step_bounds(engine: str, compute: float, hidden: float, exposed: float) -> tuple[float, float]:
    """Seconds of a step if computing hides all messages that it is long enough for, and if it hides none.

    The backward of the last micro-batch hides sums; all of the work hides what each micro-batch sends.
    """
    hides = compute if engine.startswith("ZeRO 3") else BACKWARD_SHARE * compute / SLOTS
    return compute - hides + max(hides, hidden) + exposed, compute + hidden + exposed


def measured(name: str, **wanted: Any) -> dict[str, Any]:
    """The line of analysis/engines whose arguments are these."""
    lines = [json.loads(line) for line in (MEASURED / f"{name}.jsonl").read_text().splitlines()]
    found: dict[str, Any]
    (found,) = (each for each in lines if all(each.get(key) == value for key, value in wanted.items()))
    return found


def computed_by_one_gpu() -> dict[str, dict[str, float]]:
    """Seconds of a step on one H200, ViT-B, 2 x 64 images, by engine and plan."""
    vit_b = {"model": "vit_base_patch16_224", "ranks": 1}
    parts: dict[str, dict[str, float]] = {}
    for engine, wanted in (
        ("DDP", {"engine": "ddp"}),
        ("ZeRO 1", {"engine": "deepspeed", "stage": 1}),
        ("ZeRO 3 / FSDP2", {"engine": "fsdp2"}),
    ):
        static = measured("h200_one_rank", planner="static", **wanted, **vit_b)
        tokens = measured("h200_tokens", planner="tokens", **wanted, **vit_b)
        dense = static["dense_seconds"]
        over_dense = {
            "static 0.6": static["plan_over_dense"]["median"],
            "tokens 0.6": _tokens_over_dense(tokens, 0.6),
            "tokens 0.4": tokens["plan_over_dense"]["median"],
        }
        if engine == "DDP":
            makespan = measured("h200_one_rank", planner="makespan", **wanted, **vit_b)
            over_dense["makespan 0.6"] = makespan["plan_over_dense"]["median"]
        parts[engine] = {"dense": dense} | {plan: ratio * dense for plan, ratio in over_dense.items()}
    return parts


def _tokens_over_dense(line: dict[str, Any], budget: float) -> float:
    """Of a run at another budget than was measured: the curve's own mix of the measured sizes."""
    sizes: dict[tuple[int, int], Any] = {}
    for name, of_size in line["of_run"].items():
        down, across = map(int, name.split(" x "))
        sizes[down, across] = of_size
    grids = sorted(sizes)
    ratios = [sizes[grid]["over_dense"]["median"] for grid in grids]
    costs = [grid[0] * grid[1] / (grids[-1][0] * grids[-1][1]) for grid in grids]
    steps = token_curve(grids, costs, budget, [1] * 1000).steps
    return float(np.dot(steps, ratios)) / sum(steps)


def rows() -> Iterator[dict[str, Any]]:
    """Every simulated step."""
    parts = computed_by_one_gpu()
    for network in NETWORKS:
        for ranks in RANKS:
            for engine in ENGINES:
                sent = gradient_seconds(engine, network, ranks)
                yield from _of_plans(engine, "as measured", network, ranks, parts[engine], sent)
                if engine != "DDP":
                    yield from _of_plans(engine, "GPU work alone", network, ranks, parts["DDP"], sent)
            yield from _tensor_parallel(network, ranks, parts["DDP"]["dense"])
            yield from _won_back(network, ranks, parts["DDP"])


def _of_plans(
    engine: str,
    parts_are: str,
    network: Network,
    ranks: int,
    parts: dict[str, float],
    sent: tuple[float, float],
) -> Iterator[dict[str, Any]]:
    dense = step_bounds(engine, parts["dense"], *sent)
    for plan, compute in parts.items():
        least, most = step_bounds(engine, compute, *sent)
        yield {
            "engine": engine,
            "parts": parts_are,
            "network": network.name,
            "ranks": ranks,
            "plan": plan,
            "compute_seconds": compute,
            "sent_seconds": sum(sent),
            "seconds": [least, most],
            "over_dense": [least / dense[0], most / dense[1]],
            "images_per_second": [128 * ranks / most, 128 * ranks / least],
        }


def _won_back(network: Network, ranks: int, parts: dict[str, float]) -> Iterator[dict[str, Any]]:
    """What could win the saving back where gradients take it, with DDP's work: fewer bytes, or sent less often."""
    all_reduce = network.all_reduce(4 * PARAMETERS, ranks)
    for way, sent in (
        ("bf16 gradients", network.all_reduce(2 * PARAMETERS, ranks)),
        ("batch x 4 before a reduction", all_reduce / 4),
        ("local updates, weights averaged every 16 steps", all_reduce / 16),
    ):
        few = {plan: parts[plan] for plan in ("dense", "static 0.6", "tokens 0.4")}
        yield from _of_plans(f"DDP, {way}", "as measured", network, ranks, few, (sent, 0.0))


def _tensor_parallel(
    network: Network, ranks: int, dense_seconds: float, size: int = 4
) -> Iterator[dict[str, Any]]:
    """TP 4 inside a node x DP, by the product's own model of a step.

    Subnets' work is a fourth on each rank, what always runs is not. Nothing hides the messages between the ranks of a
    block in the replicated layout.
    """
    always = measured("h200_one_rank", engine="ddp", planner="makespan")["always_share"]
    of_subnets = dense_seconds * (1 - always) / SLOTS
    time = StepTime(
        seconds_per_cost=of_subnets / (BLOCKS * HEADS),
        activation_bytes=ACTIVATION_BYTES,
        seconds_per_byte=1 / (network.efficiency * network.nvlink),
        latency=network.hop_seconds[0] * math.log2(size),
    )
    of_a_rank = OF_BLOCKS / size + PARAMETERS - OF_BLOCKS
    hidden = network.all_reduce(4 * of_a_rank, ranks // size, size)
    dense = SkipPlan.dense(SLOTS, 1, BLOCKS, HEADS)
    dense_problem = _tp_problem(size, None)
    plan = solve(_tp_problem(size, 0.5), "makespan")
    parts = {
        name: always * dense_seconds + time.of(its_plan, dense_problem, "replicated")
        for name, its_plan in (("dense", dense), ("makespan 0.6", plan))
    }
    for row in _of_plans(
        f"TP {size} x DP", "DDP's, always-run part whole", network, ranks, parts, (hidden, 0.0)
    ):
        yield row | {"images_per_second": [value / size for value in row["images_per_second"]]}


def _tp_problem(size: int, communication: float | None) -> PlanProblem:
    scores = np.random.default_rng(0).lognormal(sigma=0.7, size=(2, SLOTS, BLOCKS, HEADS))
    budgets = Budgets(0.6 if communication else 1.0, communication)
    devices = Devices(rank=in_order(BLOCKS, HEADS, size))
    return pose(scores, GivenShares(1 / 3), budgets, devices, messages="replicated")


def check() -> list[dict[str, Any]]:
    """What was measured and counted on two GPUs, beside what the simulation makes of one GPU's parts."""
    network = NETWORKS[0]
    parts = computed_by_one_gpu()
    checked = []
    for engine, name, wanted in (
        ("DDP", "h200x2_block_graphs", {"engine": "ddp", "planner": "static"}),
        ("ZeRO 1", "h200_block_graphs", {"engine": "deepspeed", "stage": 1, "planner": "static"}),
        ("ZeRO 3 / FSDP2", "h200", {"engine": "fsdp2", "planner": "makespan"}),
    ):
        line = measured(name, ranks=2, **wanted)
        sent = gradient_seconds(engine, network, 2)
        dense = step_bounds(engine, parts[engine]["dense"], *sent)
        plan = step_bounds(engine, parts[engine]["static 0.6"], *sent)
        of_ring = {"all-reduce": 2 / 2, "gather": 1 / 2}  # times (ranks - 1) / ranks, of two
        checked.append(
            {
                "engine": engine,
                "bytes": sum(of_ring[collective] * size for collective, size, _ in messages_of(engine)),
                "counted_bytes": sum(line["bytes_sent"]["dense"].values()),
                "dense_seconds": [*dense],
                "measured_dense_seconds": line["dense_seconds"],
                "over_dense": [plan[0] / dense[0], plan[1] / dense[1]],
                "measured_over_dense": line["plan_over_dense"]["median"],
            }
        )
    return checked


def draw(every: list[dict[str, Any]], path: Path) -> None:
    """Plan over dense against the number of GPUs, both bounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [("DDP", "as measured"), ("ZeRO 1", "GPU work alone"), ("ZeRO 3 / FSDP2", "GPU work alone")]
    figure, axes = plt.subplots(len(NETWORKS), len(shown), figsize=(11, 8.5), sharex=True, sharey=True)
    for across, network in zip(axes, NETWORKS, strict=True):
        for axis, (engine, parts) in zip(across, shown, strict=True):
            for plan, colour in (
                ("static 0.6", "tab:blue"),
                ("tokens 0.6", "tab:green"),
                ("tokens 0.4", "tab:orange"),
            ):
                here = [
                    row
                    for row in every
                    if (row["engine"], row["parts"], row["network"], row["plan"])
                    == (engine, parts, network.name, plan)
                ]
                bounds = np.array([row["over_dense"] for row in here])
                ranks = [row["ranks"] for row in here]
                axis.fill_between(ranks, bounds.min(axis=1), bounds.max(axis=1), color=colour, alpha=0.3)
                axis.plot(ranks, bounds[:, 0], color=colour, label=f"{plan}, hidden")
                axis.plot(ranks, bounds[:, 1], color=colour, linestyle="--", label=f"{plan}, nothing hidden")
            axis.axhline(1.0, color="grey", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_title(f"{engine}, {network.name}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("step over dense (simulated)")
    for axis in axes[-1]:
        axis.set_xlabel("GPUs")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=3, fontsize=8, frameon=False
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


def table(every: list[dict[str, Any]]) -> str:
    """Plan over dense at the ends of the range: backward hides all it can, nothing hidden."""
    told = ["| network | engine, parts | plan | 8 GPUs | 256 | 4,096 | sent at 4,096, ms |", "|---" * 7 + "|"]
    keys = {
        (row["network"], row["engine"], row["parts"], row["plan"]) for row in every if row["plan"] != "dense"
    }
    for key in sorted(keys):
        of = {
            row["ranks"]: row
            for row in every
            if (row["network"], row["engine"], row["parts"], row["plan"]) == key
        }
        bounds = [
            f"{of[ranks]['over_dense'][0]:.2f}, {of[ranks]['over_dense'][1]:.2f}" for ranks in (8, 256, 4096)
        ]
        sent = f"{1e3 * of[4096]['sent_seconds']:.1f}"
        told.append(f"| {key[0]} | {key[1]}, {key[2]} | {key[3]} | {' | '.join(bounds)} | {sent} |")
    return "\n".join(told)


def main() -> None:
    every = list(rows())
    with (HERE / "simulated.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in every)
    draw(every, HERE / "scaling.png")
    for line in check():
        print(json.dumps(line))
    print(table(every))


if __name__ == "__main__":
    main()
