"""Fine-tunes ViT-S/14 DINOv2 with a resolution that changes over the run: one process is one run and one line of JSON.

    python explore.py name=q data=cifar100 res=0.4:112/0.4:168/0.2:224 seed=1     # or key=value,key=value
    python explore.py --dry r1.txt              # steps, shares and compute of each line's run; trains nothing
    python explore.py --prep cifar100           # decodes the images into the cache

Environment: EXPLORE_DATA (folders with cifar100.h5, ... and vit_small_patch14_dinov2.safetensors, ':' between them),
EXPLORE_OUT (folder of runs.jsonl; default .), EXPLORE_CACHE (folder of decoded images; default cache in EXPLORE_OUT),
EXPLORE_COMPILE (default of the setting comp).
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.ops import roi_align

DEFAULTS: dict[str, Any] = {
    "name": "run",
    "data": "cifar100",
    "split": "val",  # val: tested on training images that are left out of the run; test: on the test images
    "val": 0.1,  # the share left out
    "fold": 0,  # which images those are
    "seed": 0,
    "ep": 1.0,  # epochs of the dense run that compute is measured against
    "steps": 1.0,  # images that the run takes, over those of the dense run
    "b": 80,  # batch size
    "n": 0,  # training images, 0: all
    "lr": 4e-5,
    "hl": 25.0,  # the classifier's rate is hl * lr
    "wu": "",  # share of the steps in which the rate rises; default 0.2, 0.1 with init
    "wd": 0.05,
    "clip": 1.0,
    "b1": 0.9,
    "b2": 0.999,
    "half": 0,  # 1: b1 and b2 are those of a batch of 80, at any size the same in images
    "sched": "cosine",  # hold: full for half of the steps after the warm-up; work: linear in compute, not in steps
    "frozen": "",  # for each of the levels, the lowest blocks that only run forward there
    "llrd": 1.0,  # factor on the rate from a block to the one below
    "drop": 0.0,  # stochastic depth
    "ls": 0.0,  # label smoothing
    "res": "224",  # share:resolution/share:resolution...; -224: that size, its tokens merged by the first of `merge`
    # |-separated; pool:K: four neighbours are one from block K on; tome:N/N/...: tokens left in each block's MLP, by
    # keys; like:N/N/...: tokens in each block, by themselves; a resolution of -1224 merges by the second, and so on
    "merge": "",
    "prop": 0,  # 1: attention counts a merged token as often as tokens are in it; 2: also those of small images
    "curve": 0.0,  # compute as a share of dense: shares of `levels` are chosen to meet it (instead of `res`)
    "levels": "112/168/224",
    "tail": 0.0,  # share of the steps that are at the last level at least
    "evr": "224",  # resolutions to test at
    "noise": 0.0,  # how much the order of the resolutions is shuffled
    "end": 0.05,  # share of the steps, the last ones, that `noise` leaves where they are
    "mix": "",  # by phase: share of a batch at the phase's resolution, the rest at bres; -1: all
    "bres": 112,
    "how": "err",  # which images these are: of the largest error, loss, ..., uni: any, shuf: by other images' errors
    "skip": 0.0,  # share of a mixed batch, of the least error, that does not train
    "rw": 0.5,  # how=reuse: weight of the second look, below 0: both are samples
    "init": 0,  # images that a ridge regression fits the classifier to, 0: none
    "initres": 112,
    "ema": 0.0,  # decay of the average of the weights that is tested
    "ema_half": 0.0,  # or its half-life in images
    "emb": 0,  # 1: the embeddings are trained, too
    "head0": 0,  # 1: the classifier starts at zero
    "head32": 0,  # 1: the classifier computes in fp32
    "pos": 16,  # side of the grid that position embeddings are resampled from
    "interp": "bilinear",
    "aug": "",  # default: rrc for caltech101, else shift (and flip)
    "norm": "imagenet",
    "ecrop": -1.0,  # tested square over the image's shorter side; default 7/8 with rrc, else the whole image
    "grow": 0.0,  # how much stronger augmentation is at 224 px than at 112
    "prec": "bf16",
    "comp": int(os.environ.get("EXPLORE_COMPILE", "0")),  # 1: compiled blocks
    "graphs": 1,  # 1: CUDA graphs
    "tiny": 0,  # 1: a tiny untrained model, for a trial on a CPU
    "save": 0,  # 1: keep the weights
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "data": ("cifar10", "cifar100", "caltech101"),
    "split": ("val", "test"),
    "sched": ("cosine", "linear", "const", "hold", "work"),
    "how": ("err", "loss", "uni", "shuf", "reuse", "err2"),
    "interp": ("bilinear", "bicubic"),
    "pos": (16, 37),
    "aug": ("", "none", "shift", "flip", "rrc"),
    "norm": ("imagenet", "half"),
    "prec": ("bf16", "fp32"),
}
# training images, classes
SIZE = {"cifar10": (50000, 10), "cifar100": (50000, 100), "caltech101": (3175, 101)}
# side of the stored square (whole image, squashed)
PIXELS = {"cifar10": 32, "cifar100": 32, "caltech101": 288}
PATCH, DRAWS = 14, 8
EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token")
FOLDERS = [Path(folder) for folder in os.environ.get("EXPLORE_DATA", "").split(":") if folder]
OUT = Path(os.environ.get("EXPLORE_OUT", "."))
CACHE = Path(os.environ.get("EXPLORE_CACHE", OUT / "cache"))


class Settings(dict[str, Any]):
    """Settings are also read as attributes."""

    def __getattr__(self, key: str) -> Any:
        return self[key]


def parse(args: Sequence[str]) -> Settings:
    c, given = Settings(DEFAULTS), []
    for part in ",".join(args).replace(" ", ",").split(","):
        if not part:
            continue
        key, _, value = part.partition("=")
        if key not in DEFAULTS:
            sys.exit(f"unknown setting {part!r}; known: {' '.join(DEFAULTS)}")
        kind = type(DEFAULTS[key])
        c[key] = kind(float(value)) if kind is int else kind(value)
        if key in CHOICES and c[key] not in CHOICES[key]:
            sys.exit(f"{part}: one of {CHOICES[key]}")
        if key not in ("name", "data", "split"):
            given.append(part)
    c["settings"] = ",".join(given)
    if not c.aug:
        c["aug"] = "rrc" if c.data == "caltech101" else "shift"
    if c.ecrop < 0:  # as d2ft_hpc: 7/8 of the shorter side beside random crops, else the whole image
        c["ecrop"] = 7 / 8 if c.aug == "rrc" else 1.0
    rise = 0.1 if c.init else 0.2
    c["wu"] = float(c.wu) if c.wu != "" else rise
    c["ntrain"] = c.n or (SIZE[c.data][0] - (round(c.val * SIZE[c.data][0]) if c.split == "val" else 0))
    c["dim"], c["depth"], c["heads"] = (48, 3, 3) if c.tiny else (384, 12, 6)
    if c.pos == 37 and c.emb:
        sys.exit("pos=37 needs emb=0")
    for way in c.merge.split("|") if c.merge else ():
        how, _, amount = way.partition(":")
        if how not in ("pool", "tome", "like") or (how != "pool" and len(amount.split("/")) != c.depth):
            sys.exit(f"merge={way}: pool:K, or tome: or like: with {c.depth} numbers of tokens")
        if c.drop or c.frozen:
            sys.exit("merge goes neither with drop nor with frozen")
    if c.how == "reuse" and c.skip:
        sys.exit("how=reuse trains every image: no skip")
    return c


# ---------------------------------------------------------------- plan and cost
def side(r: int) -> int:
    """Pixels along an image of this level."""
    return abs(r) % 1000


def merging(c: Settings, r: int) -> tuple[str, str]:
    """How this level merges tokens, and by how much."""
    how, _, amount = c.merge.split("|")[-r // 1000].partition(":") if r < 0 else ("", "", "")
    return how, amount


def patches_in_blocks(c: Settings, r: int) -> list[tuple[int, int]]:
    """Patch tokens in the attention and in the MLP of each block."""
    p = (side(r) // PATCH) ** 2
    how, amount = merging(c, r)
    if how == "pool":
        return [(p, p) if k < int(amount) else (p // 4, p // 4) for k in range(c.depth)]
    if how:
        left = [min(int(n), p) for n in amount.split("/")]
        return list(zip([p, *left] if how == "tome" else left, left, strict=False))
    return [(p, p)] * c.depth


def forward_flops(c: Settings, r: int) -> tuple[int, int]:
    """(patch projection, the rest) of one image's forward."""
    d, blocks, before = c.dim, 0, (side(r) // PATCH) ** 2
    for in_attention, in_mlp in patches_in_blocks(c, r):
        n, m = in_attention + 1, in_mlp + 1
        blocks += 8 * d * d * n + 4 * n * n * d + 16 * d * d * m
        if in_mlp < before and merging(c, r)[0] != "pool":  # the likenesses, which have no gradient
            width = d if merging(c, r)[0] == "like" else d // c.heads
            blocks += 2 * (before // 2) ** 2 * width // 3
        before = in_mlp
    return 2 * (side(r) // PATCH) ** 2 * 3 * PATCH**2 * d, blocks + 2 * d * SIZE[c.data][1]


def score_cost(c: Settings, r: int) -> int:
    return sum(forward_flops(c, r))


def train_cost(c: Settings, r: int, emb: int | None = None) -> int:
    patch, rest = forward_flops(c, r)
    in_blocks = rest - 2 * c.dim * SIZE[c.data][1]
    forward_only = in_blocks * frozen_blocks(c, r) // c.depth
    trains_patches = c.emb if emb is None else emb
    cost: int = patch * (2 if trains_patches else 1) + 3 * rest - 2 * forward_only
    return cost


def frozen_blocks(c: Settings, r: int) -> int:
    """The lowest blocks that have no backward at this resolution."""
    by_level = dict(zip(c.levels.split("/"), c.frozen.split("/"), strict=False)) if c.frozen else {}
    return int(by_level.get(str(r), 0))


def max_entropy(costs: Sequence[float], target: float, tail: float) -> np.ndarray:
    """Shares (of levels, cheap to dear) with this mean cost.

    `tail` is at the last level, the rest in proportion to exp(-lambda cost).
    """

    def shares(lam: float) -> np.ndarray:
        z = -lam * np.array(costs)
        e = np.exp(z - z.max())
        s: np.ndarray = (1 - tail) * e / e.sum()
        s[-1] += tail
        return s

    low, high = -1e4, 1e4
    if not shares(high) @ costs - 1e-9 <= target <= shares(low) @ costs + 1e-9:
        least, most = shares(high) @ costs, shares(low) @ costs
        sys.exit(f"curve: mean cost {target:.4f} lies outside {least:.4f} to {most:.4f}")
    for _ in range(200):
        mid = (low + high) / 2
        low, high = (mid, high) if shares(mid) @ costs > target else (low, mid)
    return shares((low + high) / 2)


Step = tuple[int, float, bool]


def plan(c: Settings) -> tuple[list[Step], float, list[tuple[float, int]]]:
    """Per step (resolution, share at it or -1, whether it must be scored); compute as a share of dense; the phases."""
    dense = train_cost(Settings(c | {"frozen": ""}), 224, emb=0)
    total = c.ep * c.ntrain * dense
    spent = 0.0
    if c.init:
        n, d = min(c.init, c.ntrain), c.dim + 1
        spent += n * score_cost(c, c.initres)
        spent += 2 * (2 * n * d * d + 2 * n * d * SIZE[c.data][1]) + 2 * 25 * d**3
    steps = int(round(c.ep * c.ntrain * c.steps) // c.b)
    if c.curve:
        levels = [int(x) for x in c.levels.split("/")]
        costs = [train_cost(c, r) / dense for r in levels]
        # exactly: over the images that the whole steps really take
        shares = max_entropy(costs, (c.curve - spent / total) * c.ep * c.ntrain / (steps * c.b), c.tail)
        phases = list(zip(map(float, shares), levels, strict=True))
    else:
        parts = [part.split(":") if ":" in part else ("1", part) for part in c.res.split("/")]
        phases = [(float(share), int(r)) for share, r in parts]
        if abs(sum(s for s, _ in phases) - 1) > 1e-6:
            sys.exit(f"res={c.res}: shares sum to {sum(s for s, _ in phases)}, not 1")
    # m >= 0: that share of a batch at the phase's resolution, the rest (but for `skip`) at bres
    mixes = [float(m) for m in c.mix.split("/")] if c.mix else [-1.0] * len(phases)
    mixes += [mixes[-1]] * (len(phases) - len(mixes))
    for r in [r for _, r in phases] + [c.bres, c.initres] + [int(r) for r in c.evr.split("/")]:
        if side(r) % PATCH:
            sys.exit(f"{r} px is no multiple of {PATCH}")
    ends = np.cumsum([s for s, _ in phases])
    rows: list[Step] = []
    for s in range(steps):
        k = min(int(np.searchsorted(ends, (s + 0.5) / steps)), len(phases) - 1)
        r, m = phases[k][1], mixes[k]
        if m >= 0 and counts(c, m)[1] == c.b:  # nothing to choose
            r, m = c.bres, -1.0
        if m >= 0 and counts(c, m)[0] == c.b and c.how != "reuse":
            m = -1.0
        if m < 0:
            rows.append((r, -1.0, False))
            spent += c.b * train_cost(c, r)
            continue
        hi, mid, _ = counts(c, m)
        # after the first epoch the one before has told
        scored = c.how in ("err", "err2", "loss", "shuf") and s * c.b < c.ntrain
        rows.append((r, m, scored))
        if c.how == "reuse":
            spent += c.b * train_cost(c, c.bres) + hi * train_cost(c, r)
        else:
            spent += scored * c.b * score_cost(c, c.bres)
            spent += hi * train_cost(c, r) + mid * train_cost(c, c.bres)
    if c.noise:  # the same steps, less strictly from low to high; the last `end` stay where they are
        free = len(rows) - round(c.end * len(rows))
        keys = np.arange(free) / max(len(rows), 1) + c.noise * np.random.default_rng(17).random(free)
        rows = [rows[k] for k in np.argsort(keys)] + rows[free:]
    return rows, spent / total, [(round(s, 4), r) for s, r in phases]


def counts(c: Settings, m: float) -> tuple[int, int, int]:
    """Images of a mixed batch at the phase's resolution, at bres and left out."""
    hi = round(m * c.b)
    none = min(round(c.skip * c.b), c.b - hi)
    return hi, c.b - hi - none, none


# ---------------------------------------------------------------- data
def find(name: str) -> Path:
    for folder in FOLDERS:
        if (folder / name).exists():
            return folder / name
    folders = " ".join(map(str, FOLDERS)) or "none are given"
    sys.exit(f"{name} is in none of EXPLORE_DATA's folders: {folders}")


def load(data: str, part: str, limit: int = 0) -> tuple[np.ndarray, ...]:
    """Pixels, labels and sizes of a data set's images, decoded once.

    uint8 [image, 3, S, S] (the whole image as a square), int64 [image], float32 [image, 2] (width, height as stored).
    """
    stem = f"{data}-{part}-{PIXELS[data]}" + (f"-{limit}" if limit else "")
    files = [CACHE / f"{stem}-{what}.npy" for what in ("pixels", "labels", "size")]
    if not all(file.exists() for file in files):
        CACHE.mkdir(parents=True, exist_ok=True)
        side = PIXELS[data]
        with h5py.File(find(f"{data}.h5"), "r") as file:
            raw, offsets, labels = (file[part][what][:] for what in ("bytes", "offsets", "labels"))
        chosen = np.random.default_rng(0).permutation(len(labels))[: limit or None]
        chosen.sort()
        pixels = np.empty((len(chosen), 3, side, side), np.uint8)
        size = np.empty((len(chosen), 2), np.float32)

        def decode(k: int) -> None:
            i = chosen[k]
            picture = Image.open(io.BytesIO(raw[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
            size[k] = picture.size
            if picture.size != (side, side):
                # PIL filters when it shrinks
                picture = picture.resize((side, side), Image.Resampling.BICUBIC)
            pixels[k] = np.asarray(picture).transpose(2, 0, 1)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(decode, range(len(chosen)), chunksize=64))
        for target, array in zip(files, (pixels, labels[chosen].astype(np.int64), size), strict=True):
            temporary = target.with_name(f"{target.name}.{os.getpid()}.npy")
            np.save(temporary, array)
            temporary.replace(target)
    return tuple(np.load(file, mmap_mode="r") for file in files)


def boxes_train(size: Tensor, draws: Tensor, least: float) -> Tensor:
    """Random crops as d2ft_hpc's: (left, top, right, bottom) in the stored picture's own pixels."""
    w, h = size[:, 0], size[:, 1]
    area = (least + (1 - least) * draws[:, 3]) * w * h
    ratio = torch.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draws[:, 4])
    bw, bh = torch.minimum((area * ratio).sqrt(), w), torch.minimum((area / ratio).sqrt(), h)
    left, top = draws[:, 1] * (w - bw), draws[:, 0] * (h - bh)
    return torch.stack([left, top, left + bw, top + bh], 1)


def cut(x: Tensor, size: Tensor, boxes: Tensor, r: int) -> Tensor:
    scale = x.shape[-1] / torch.cat([size, size], 1)
    rois = torch.cat([torch.arange(len(x), device=x.device, dtype=torch.float32)[:, None], boxes * scale], 1)
    result: Tensor = roi_align(x, rois, (r, r), aligned=True)  # averages over each pixel's bin: anti-aliased
    return result


def resized(c: Settings, x: Tensor, r: int) -> Tensor:
    if x.shape[-1] == r:
        return x
    return F.interpolate(x, (r, r), mode=c.interp, antialias=True).clamp(0, 1)


def mean_and_std(c: Settings, device: torch.device) -> list[Tensor]:
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pair = imagenet if c.norm == "imagenet" else ((0.5,) * 3, (0.5,) * 3)
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in pair]


def augmented(c: Settings, u8: Tensor, size: Tensor, draws: Tensor, r: int, mean_std: list[Tensor]) -> Tensor:
    x, r = u8.float() / 255, side(r)
    s = c.grow * max(0.0, (r - 112) / 112)  # 0 at 112 px, `grow` at 224
    if c.aug == "rrc":
        x = cut(x, size, boxes_train(size, draws, 0.5 - 0.25 * min(s, 1)), r)
    else:
        x = resized(c, x, r)
        far = int(r // 8 * (1 + 0.5 * s)) if c.aug == "shift" else 0
        if far:
            place, last = torch.arange(r, device=x.device), r - 1  # mirrored at the edges
            rows, columns = (
                last
                - (last - (place + torch.floor(draws[:, k, None] * (2 * far + 1)).long() - far).abs()).abs()
                for k in (0, 1)
            )
            n, ch = torch.arange(len(x), device=x.device), torch.arange(3, device=x.device)
            rows, columns = rows[:, None, :, None], columns[:, None, None, :]
            x = x[n[:, None, None, None], ch[None, :, None, None], rows, columns]
    if c.aug != "none":
        x = torch.where(draws[:, 2, None, None, None] < 0.5, x.flip(3), x)
    if s:  # brightness, contrast, saturation
        f = (1 + 0.4 * s * (2 * draws[:, 5:8] - 1))[:, :, None, None, None]
        x = x * f[:, 0]
        middle = x.mean((1, 2, 3), keepdim=True)
        x = middle + (x - middle) * f[:, 1]
        grey = x.mean(1, keepdim=True)
        x = (grey + (x - grey) * f[:, 2]).clamp(0, 1)
    return (x - mean_std[0]) / mean_std[1]


def seen_in_test(c: Settings, u8: Tensor, size: Tensor, r: int, mean_std: list[Tensor]) -> Tensor:
    x, r = u8.float() / 255, side(r)
    if c.ecrop < 1:
        square = size.min(1, keepdim=True).values * c.ecrop
        x = cut(x, size, torch.cat([(size - square) / 2, (size + square) / 2], 1), r)
    else:
        x = resized(c, x, r)
    return (x - mean_std[0]) / mean_std[1]


# ---------------------------------------------------------------- model
def build(c: Settings, classes: int) -> tuple[Any, Tensor]:
    """(model of img_size 224 with a new classifier, position embeddings of the 37 x 37 grid)."""
    if c.tiny:
        model = VisionTransformer(
            img_size=224,
            patch_size=PATCH,
            embed_dim=c.dim,
            depth=c.depth,
            num_heads=c.heads,
            num_classes=classes,
            init_values=0.1,
            dynamic_img_size=True,
            drop_path_rate=c.drop,
        )
        grid = resample_abs_pos_embed(model.pos_embed.detach(), [37, 37], num_prefix_tokens=1)
    else:
        name = "vit_small_patch14_dinov2"
        state = {k: v.float() for k, v in load_file(find(f"{name}.safetensors")).items()}
        source = timm.create_model(name, img_size=518, num_classes=0, dynamic_img_size=True)
        source.load_state_dict(state, strict=True)
        model = timm.create_model(
            name, img_size=224, num_classes=classes, dynamic_img_size=True, drop_path_rate=c.drop
        )
        grid = source.pos_embed.detach().clone()
        state = source.state_dict()
        state["pos_embed"] = resample_abs_pos_embed(grid, [16, 16], num_prefix_tokens=1)
        missing, extra = model.load_state_dict(state, strict=False)
        assert (set(missing), extra) == ({"head.weight", "head.bias"}, []), (missing, extra)
    if c.head0:
        torch.nn.init.zeros_(model.head.weight)
        torch.nn.init.zeros_(model.head.bias)
    for name, p in model.named_parameters():
        if not c.emb and name.split(".")[0] in EMBEDDINGS:
            p.requires_grad_(False)
    return model, grid


def apply(block: Any, x: Tensor) -> Tensor:
    result: Tensor = block(x)
    return result


def merged(x: Tensor, count: Tensor, by: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """The likest of x's tokens become their mean, until `left` and the class token, the first, are left.

    x: [image, token, width]; count: [image, token], the patches in each; by: [image, token, any], whose directions are
    compared. As in ToMe (arXiv 2210.09461) every second token looks for the likest of the others.
    """
    gone = x.shape[1] - 1 - left
    if not gone:
        return x, count
    with torch.no_grad():
        likeness = F.normalize(by[:, 1:].float(), dim=-1)
        best, partner = (likeness[:, ::2] @ likeness[:, 1::2].mT).max(-1)
        order = best.argsort(dim=-1, descending=True)
        goes, stays = order[:, :gone], order[:, gone:]
        target = partner.gather(1, goes)

    def joined(t: Tensor) -> Tensor:
        first, a, b = t[:, :1], t[:, 1::2], t[:, 2::2]
        wide = (-1, -1, t.shape[2])
        b = b.scatter_add(1, target[:, :, None].expand(wide), a.gather(1, goes[:, :, None].expand(wide)))
        return torch.cat([first, a.gather(1, stays[:, :, None].expand(wide)), b], 1)

    mass = count[:, :, None]
    total = joined(mass)
    return joined(x * mass) / total, total[:, :, 0]


def block_on_merged(block: Any, x: Tensor, count: Tensor, left: int, prop: bool) -> tuple[Tensor, Tensor]:
    """A block on tokens that are means of `count` patches, of which `left` are left in its MLP.

    x: [image, 1 + patch token, width], the class token first.
    """
    n, tokens, width = x.shape
    attention = block.attn
    q, k, v = attention.qkv(block.norm1(x)).view(n, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    often = count.log().to(q.dtype)[:, None, None].expand(-1, -1, tokens, -1) if prop else None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=often).transpose(1, 2).reshape(n, tokens, width)
    x, count = merged(x + block.ls1(attention.proj(out)), count, k.mean(1), left)
    return x + block.ls2(block.mlp(block.norm2(x))), count


class Net:
    """The model's forward: patches as one product, position embeddings by resolution, and blocks maybe compiled."""

    def __init__(self, c: Settings, model: Any, grid: Tensor, device: torch.device) -> None:
        self.c, self.model, self.grid, self.device = c, model, grid.to(device), device
        self.positions: dict[int, Tensor] = {}
        self.training_block: Callable[[Any, Tensor], Tensor] = apply
        self.counting_block: Callable[..., tuple[Tensor, Tensor]] = block_on_merged
        if c.comp:
            import torch._dynamo as dynamo

            dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
            for limit in ("recompile_limit", "cache_size_limit"):
                if hasattr(dynamo.config, limit):
                    setattr(dynamo.config, limit, 64)
            self.training_block = torch.compile(apply, dynamic=False)
            self.counting_block = torch.compile(block_on_merged, dynamic=False)

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.c.prec == "bf16", cache_enabled=False
        )

    def position(self, r: int) -> Tensor:
        g = r // PATCH
        if self.c.emb:
            own: Tensor = self.model.pos_embed
            return own if g == 16 else resample_abs_pos_embed(own, [g, g], num_prefix_tokens=1)
        if r not in self.positions:
            source = self.model.pos_embed.detach() if self.c.pos == 16 else self.grid
            as_is = g == 16 and self.c.pos == 16
            self.positions[r] = (
                source if as_is else resample_abs_pos_embed(source, [g, g], num_prefix_tokens=1)
            )
        return self.positions[r]

    def on_merged(self, x: Tensor, level: int, training: bool) -> Tensor:
        """All blocks on tokens of a level that merges them, or that attention is to count more than once.

        x: [image, 1 + patch token, width].
        """
        n, g, prop = len(x), side(level) // PATCH, bool(self.c.prop)
        each = (16 / g) ** 2 if self.c.prop == 2 else 1.0
        count = torch.cat([x.new_ones(n, 1), x.new_full((n, g * g), each)], 1)
        how = merging(self.c, level)[0]
        for block, (before, left) in zip(self.model.blocks, patches_in_blocks(self.c, level), strict=True):
            if how == "pool" and before < x.shape[1] - 1:  # four neighbours become their mean
                grid = x[:, 1:].unflatten(1, (g // 2, 2, g // 2, 2)).mean((2, 4)).flatten(1, 2)
                x = torch.cat([x[:, :1], grid], 1)
                count = torch.cat([x.new_ones(n, 1), x.new_full((n, before), 4 * each)], 1)
            if how == "like":
                x, count = merged(x, count, x, left)
            if how == "tome":  # has too many shapes to be compiled
                x, count = block_on_merged(block, x, count, left, prop)
            elif prop:
                x, count = (self.counting_block if training else block_on_merged)(block, x, count, left, prop)
            else:
                x = (self.training_block if training else apply)(block, x)
        return x

    def features(self, x: Tensor, level: int, training: bool = True) -> Tensor:
        """x: [image, 3, side, side], the images of a level."""
        model, n, r = self.model, len(x), x.shape[-1]
        g = r // PATCH
        with torch.autocast(self.device.type, enabled=False):
            position = self.position(r)
        patches = x.view(n, 3, g, PATCH, g, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(n, g * g, -1)
        p = F.linear(patches, model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias)
        x = torch.cat([model.cls_token.expand(n, -1, -1), p.float()], 1) + position
        if level < 0 or (self.c.prop == 2 and g != 16):
            x = self.on_merged(x, level, training)
        else:
            forward_only = frozen_blocks(self.c, r) if training else 0
            for k, block in enumerate(model.blocks):
                with torch.no_grad() if k < forward_only else nullcontext():
                    x = (self.training_block if training else apply)(block, x)
        result: Tensor = model.norm(x[:, 0]).float()  # norm is by token: the class token's alone is needed
        return result

    def head(self, f: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False) if self.c.head32 else nullcontext():
            result: Tensor = self.model.head(f).float()
        return result

    def logits(self, x: Tensor, level: int, training: bool = True) -> Tensor:
        return self.head(self.features(x, level, training))


Fit = Callable[[float], tuple[Tensor, Tensor]]


def ridge(f: Tensor, t: Tensor) -> Fit:
    """Weights and bias of the ridge regression of targets on standardised features, as a function of its strength."""
    mean, std, middle = f.mean(0), f.std(0) + 1e-6, t.mean(0)
    z = (f - mean) / std
    values, q = torch.linalg.eigh(z.T @ z / len(z))
    right = q.T @ (z.T @ (t - middle)) / len(z)

    def at(strength: float) -> tuple[Tensor, Tensor]:
        w = (q @ (right / (values.clamp(min=0)[:, None] + strength))) / std[:, None]
        return w, middle - mean @ w

    return at


def fit_head(
    c: Settings, net: Net, pixels: Tensor, size: Tensor, labels: Tensor, classes: int, mean_std: list[Tensor]
) -> dict[str, float]:
    """Sets the classifier to a ridge regression on one-hot targets; strength and temperature by a held-out fifth."""
    gen = np.random.default_rng((c.seed, 77))
    chosen = torch.from_numpy(gen.permutation(len(labels))[: c.init]).to(labels.device)
    with torch.no_grad(), net.autocast():
        parts = [
            net.features(seen_in_test(c, pixels[i], size[i], c.initres, mean_std), c.initres, training=False)
            for i in chosen.split(500)
        ]
    f = torch.cat(parts).double()
    y = labels[chosen]
    target = F.one_hot(y, classes).double()
    fit = max(len(f) * 4 // 5, 1)
    at = ridge(f[:fit], target[:fit])
    held, held_y = f[fit:], y[fit:]
    temperatures = torch.tensor(np.geomspace(0.5, 100, 60), device=f.device)
    best = (math.inf, 0.0, 0.0, 0.0)
    # judged by the held-out loss at its best temperature
    for strength in (10.0**e for e in np.arange(-4, 2.01, 0.5)):
        w, bias = at(strength)
        out = held @ w + bias
        nll = torch.stack([F.cross_entropy(out * t, held_y) for t in temperatures])
        k = int(nll.argmin())
        if float(nll[k]) < best[0]:
            accuracy = float((out.argmax(1) == held_y).double().mean())
            best = float(nll[k]), strength, float(temperatures[k]), accuracy
    loss, strength, t, accuracy = best
    w, bias = ridge(f, target)(strength)
    with torch.no_grad():
        net.model.head.weight.copy_((w.T * t).float())
        net.model.head.bias.copy_((bias * t).float())
    return {
        "init_held_top1": round(100 * accuracy, 2),
        "init_held_nll": round(loss, 4),
        "init_ridge": strength,
        "init_temp": round(t, 2),
    }


# ---------------------------------------------------------------- run
class Steps:
    """Runs step functions; on a GPU each (key) becomes a CUDA graph after three real steps.

    Why no state has to be restored: the warm-up before a capture consists of real training steps, done eagerly on the
    very stream that captures; capturing runs nothing; the captured step is then replayed for the batch at hand. All
    that lives from step to step (parameters, .grad, AdamW's state with its step counts, rates, average, errors) is
    allocated before a capture, outside the graphs' pool, and changed in place.
    """

    def __init__(self, on: bool, stream: Any) -> None:
        self.on, self.stream = on, stream
        self.seen: dict[Step, int] = {}
        self.graphs: dict[Step, tuple[Any, list[Tensor], Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if on else None

    def __call__(self, key: Step, function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
        if not self.on:
            return function(*inputs)
        if key not in self.graphs:
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] <= 3:
                return function(*inputs)
            static = [t.clone() for t in inputs]
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    out = function(*static)
            except Exception as error:
                why = f"{type(error).__name__}: {str(error)[:300]}"
                print(f"NOTE: no CUDA graph for {key}: {why}; eager from here on", flush=True)
                self.on = False
                torch.cuda.synchronize()
                return function(*inputs)
            self.graphs[key] = graph, static, out
        graph, static, out = self.graphs[key]
        for place, value in zip(static, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return out.clone()


def evaluate(
    c: Settings, net: Net, pixels: Tensor, size: Tensor, labels: Tensor, mean_std: list[Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """Top-1 in percent and mean loss, by resolution."""
    top1, nll = {}, {}
    net.model.eval()
    with torch.no_grad(), net.autocast():
        for r in c.evr.split("/"):
            right, loss = torch.zeros(2, device=labels.device, dtype=torch.float64)
            for i in torch.arange(len(labels), device=labels.device).split(500):
                out = net.logits(
                    seen_in_test(c, pixels[i], size[i], int(r), mean_std), int(r), training=False
                )
                right = right + (out.argmax(1) == labels[i]).sum()
                loss = loss + F.cross_entropy(out, labels[i], reduction="sum").double()
            top1[r], nll[r] = round(100 * float(right) / len(labels), 3), round(float(loss) / len(labels), 4)
    return top1, nll


def parameter_groups(c: Settings, model: Any) -> dict[tuple[float, float], list[Any]]:
    """Trained parameters by (factor on the rate, weight decay)."""
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        first, *rest = name.split(".")
        depth = c.depth + 1
        if first == "blocks":
            depth = int(rest[0]) + 1
        elif first in EMBEDDINGS:
            depth = 0
        factor = c.hl if first == "head" else c.llrd ** (c.depth + 1 - depth)
        decay = 0.0 if p.ndim <= 1 or name.endswith(".bias") else c.wd
        groups.setdefault((factor, decay), []).append(p)
    return groups


def heights(c: Settings, rows: Sequence[Step]) -> Tensor:
    """The rate of each step over its peak."""
    steps = len(rows)
    warm: int = round(c.wu * steps)
    work = np.cumsum([train_cost(c, r) for r, *_ in rows])

    def height(s: int) -> float:
        if s < warm:
            return (s + 1) / warm
        done = (s - warm) / max(steps - warm, 1)
        if c.sched == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if c.sched == "work":
            done = float((work[s] - work[warm]) / (work[-1] - work[warm]))
        if c.sched == "hold":
            return min(1.0, 2 * (1 - done))
        return 1.0 if c.sched == "const" else 1 - done

    return torch.tensor([height(s) for s in range(steps)], dtype=torch.float64)


def run(c: Settings) -> None:
    began = time.time()
    rows, compute, phases = plan(c)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(c.seed)
    torch.backends.cuda.matmul.allow_tf32 = False

    few = max(c.n // 4, 8) if c.n else 0  # images to test on in a trial with n images
    pixels, labels, size = (torch.from_numpy(np.array(a)) for a in load(c.data, "train", c.n and c.n + few))
    everything = np.random.default_rng(0).permutation(len(labels))  # the split: the same for every seed
    # fold 0: the last tenth is held out
    order = torch.from_numpy(np.roll(everything, c.fold * (len(everything) - c.ntrain)))
    train = order[: c.ntrain].sort().values
    if c.split == "val":
        test = order[c.ntrain :].sort().values
        held = [a[test] for a in (pixels, labels, size)]
    else:
        held = [torch.from_numpy(np.array(a)) for a in load(c.data, "test", few)]
    test_pixels, test_labels, test_size = (a.to(device) for a in held)
    pixels, labels, size = (a[train].to(device) for a in (pixels, labels, size))
    assert len(labels) == c.ntrain, (len(labels), c.ntrain)
    classes = SIZE[c.data][1]
    mean_std = mean_and_std(c, device)

    model, grid = build(c, classes)
    net = Net(c, model.to(device), grid, device)
    stream = torch.cuda.Stream() if cuda else None
    if (
        stream
    ):  # from here on, all on one stream of its own: what is captured later has to be off the default one
        torch.cuda.synchronize()
        torch.cuda.set_stream(stream)
    extra: dict[str, Any] = {}
    model.eval()
    if c.init:
        extra |= fit_head(c, net, pixels, size, labels, classes, mean_std)

    # AdamW; rates are a row of a table on the device
    groups = parameter_groups(c, model)
    params = [p for ps in groups.values() for p in ps]
    factors = torch.tensor([f for f, _ in groups], dtype=torch.float64)
    table = (c.lr * heights(c, rows)[:, None] * factors).float().to(device)
    rates = torch.zeros(len(groups), device=device)
    power = c.b / 80 if c.half else 1.0  # half-lives counted in images
    optimizer = torch.optim.AdamW(
        [
            {"params": ps, "lr": rates[k], "weight_decay": decay}
            for k, ((_, decay), ps) in enumerate(groups.items())
        ],
        lr=rates[0],
        betas=(c.b1**power, c.b2**power),
        eps=1e-8,
        fused=cuda,
        capturable=cuda,
        foreach=None if cuda else False,
    )
    assert all(g["lr"].data_ptr() == rates[k].data_ptr() for k, g in enumerate(optimizer.param_groups))
    for p in params:
        p.grad = torch.zeros_like(p)
    grads = [p.grad for p in params]
    keep = c.ema or (0.5 ** (c.b / c.ema_half) if c.ema_half else 0.0)
    average = [p.detach().clone() for p in params] if keep else []

    by_error = bool(c.mix) and c.how in ("err", "err2", "loss", "shuf")
    errors = torch.zeros(c.ntrain, device=device) if by_error else None
    other = torch.from_numpy(np.random.default_rng((c.seed, 5)).permutation(c.ntrain)).to(device)

    def score(out: Tensor, y: Tensor) -> Tensor:
        out = out.detach()
        if c.how == "loss":
            return F.cross_entropy(out, y, reduction="none")
        p = out.softmax(1)  # length of softmax - target; written without one_hot, which may look at values
        return (p.square().sum(1) - 2 * p.gather(1, y[:, None])[:, 0] + 1).clamp(min=0).sqrt()

    def loss_of(out: Tensor, y: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(out, y, reduction=reduction, label_smoothing=c.ls)

    def note(i: Tensor, out: Tensor, y: Tensor) -> None:
        if errors is not None:
            errors.index_copy_(0, i, score(out, y))

    def finish(loss: Tensor) -> Tensor:
        torch.autograd.backward(loss)
        if c.clip:
            torch.nn.utils.clip_grad_norm_(params, c.clip)
        optimizer.step()
        if keep:
            torch._foreach_lerp_(average, params, 1 - keep)
        return loss.detach()

    def plain(level: int) -> Callable[..., Tensor]:
        def step(i: Tensor, x: Tensor) -> Tensor:
            torch._foreach_zero_(grads)
            y = labels[i]
            with net.autocast():
                out = net.logits(x, level)
            note(i, out, y)
            return finish(loss_of(out, y, "mean"))

        return step

    def mixed(m: float, scored: bool, level: int) -> Callable[..., Tensor]:
        hi_n, mid_n, _ = counts(c, m)

        def looked_at_twice(y: Tensor, x: Tensor, low: Tensor) -> Tensor:
            with net.autocast():
                out = net.logits(low, c.bres)
            hi = score(out, y).argsort(descending=True)[:hi_n]
            each = loss_of(out, y, "none")
            loss = each.sum()
            if hi_n:
                with net.autocast():
                    more = loss_of(net.logits(x[hi], level), y[hi], "sum")
                loss = loss + more if c.rw < 0 else loss - c.rw * each[hi].sum() + c.rw * more
            average_loss: Tensor = loss / (c.b + hi_n if c.rw < 0 else c.b)
            return average_loss

        def worth_of(i: Tensor, y: Tensor, low: Tensor, chance: Tensor) -> Tensor:
            if c.how == "uni" or errors is None:
                return chance
            if scored:
                with torch.no_grad(), net.autocast():
                    worth: Tensor = score(net.logits(low, c.bres), y)
                errors.index_copy_(0, i, worth)  # also of those that then do not train
                return worth[chance.argsort()] if c.how == "shuf" else worth
            # of the epoch before; shuf: of another image, the same one in every epoch
            return errors[other[i]] if c.how == "shuf" else errors[i]

        def step(i: Tensor, x: Tensor, low: Tensor, chance: Tensor) -> Tensor:
            torch._foreach_zero_(grads)
            y = labels[i]
            if c.how == "reuse":
                return finish(looked_at_twice(y, x, low))
            worth = worth_of(i, y, low, chance)
            order = worth.argsort(descending=True)
            loss = torch.zeros((), device=device)
            for part, images, at in ((order[:hi_n], x, level), (order[hi_n : hi_n + mid_n], low, c.bres)):
                if len(part):
                    with net.autocast():
                        out = net.logits(images[part], at)
                    note(i[part], out, y[part])
                    loss = loss + loss_of(out, y[part], "sum")
            if c.skip and errors is not None and not scored:
                # what was left out comes back into the middle of its next batch
                left_out = order[hi_n + mid_n :]
                errors.index_copy_(0, i[left_out], worth.mean().expand(len(left_out)))
            return finish(loss / (hi_n + mid_n))

        return step

    # the order of the images: one permutation an epoch, batches run on over its end, so that all are full
    epochs = math.ceil(len(rows) * c.b / c.ntrain)
    permutations = [np.random.default_rng((c.seed, e)).permutation(c.ntrain) for e in range(epochs)]
    images = np.concatenate(permutations or [np.zeros(0, int)])
    batches = torch.from_numpy(images[: len(rows) * c.b].reshape(-1, c.b)).to(device)
    gen = torch.Generator(device).manual_seed(1000003 + c.seed)
    model.train()
    steps = Steps(cuda and bool(c.graphs), stream)
    functions: dict[Step, Callable[..., Tensor]] = {}
    losses = torch.zeros(max(len(rows), 1), device=device)
    if cuda:
        torch.cuda.synchronize()
    start = time.time()
    for s, (r, m, scored) in enumerate(rows):
        i = batches[s]
        draws = torch.rand(c.b, DRAWS, generator=gen, device=device)
        rates.copy_(table[s])
        u8, wh = pixels[i], size[i]
        inputs = [i, augmented(c, u8, wh, draws, r, mean_std)]
        if m >= 0:
            chance = torch.rand(c.b, generator=gen, device=device)
            inputs += [augmented(c, u8, wh, draws, c.bres, mean_std), chance]
        key = (r, m, scored)
        if key not in functions:
            functions[key] = plain(r) if m < 0 else mixed(m, scored, r)
        losses[s] = steps(key, functions[key], inputs)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.time() - start
    trace = [round(float(part.mean()), 4) for part in losses.chunk(10)]

    if keep:
        extra["top1_raw"], extra["nll_raw"] = evaluate(c, net, test_pixels, test_size, test_labels, mean_std)
        with torch.no_grad():
            torch._foreach_copy_(params, average)
    top1, nll = evaluate(c, net, test_pixels, test_size, test_labels, mean_std)
    line = {
        "name": c.name,
        "settings": c.settings,
        "data": c.data,
        "split": c.split,
        "compute": round(compute, 4),
        "top1": top1,
        "nll": nll,
        "epochs": c.ep,
        "seed": c.seed,
        "seconds": round(seconds, 1),
        "steps": len(rows),
        "batch": c.b,
        "phases": phases,
        "loss": trace,
        **extra,
        "graphs": len(steps.graphs) if steps.on else 0,
        "comp": c.comp,
        "total_seconds": round(time.time() - began, 1),
        "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else 0,
        "torch": torch.__version__,
    }
    if c.save:
        torch.save(dict(model.state_dict()), OUT / f"{c.name}.pt")
    with open(OUT / "runs.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--prep"]:
        for data in arguments[1:]:
            for part in ("train", "test"):
                print(data, part, load(data, part)[0].shape, flush=True)
    elif arguments[:1] == ["--dry"]:
        for file in arguments[1:]:
            for text in Path(file).read_text().splitlines():
                if text.partition("#")[0].strip():
                    c = parse([text.partition("#")[0]])
                    rows, compute, phases = plan(c)
                    what = f"compute {compute:.4f} steps {len(rows):6} batch {c.b} {c.data}"
                    print(f"{c.name:24} {what} {phases} {c.settings}")
    else:
        run(parse(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
