"""Every file that a user or a stranger may hand over, damaged at random: it is read, or refused in one short line."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as serialize

from d2ft_hpc import results
from d2ft_hpc.config import read_config
from d2ft_hpc.data.arrays import open_arrays
from d2ft_hpc.data.packed import describe, open_packed
from d2ft_hpc.data.packing import pack_by_name
from d2ft_hpc.engines.portable import PortableState, write_file
from d2ft_hpc.errors import D2ftError, DataError
from d2ft_hpc.launch.control import SoloControl
from d2ft_hpc.model.weights import check_complete, find_weights
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.training.checkpoint import POSITION, read_position
from d2ft_hpc.training.run_folder import LAUNCHES, check_ours, record_launch, saved_config
from tests.mutations import mutated, read_each

COUNT = 60
PIXELS = np.arange(6 * 8 * 8 * 3, dtype=np.uint8).reshape(6, 8, 8, 3)
LABELS = np.array([0, 1, 0, 1, 0, 1])


def told(read: Callable[[], object]) -> str:
    """What the reader refuses its content with, "" if it does not."""
    try:
        read()
    except D2ftError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files(tmp_path: Path, save: Any) -> None:
    image = io.BytesIO()
    save(image, x_train=PIXELS, y_train=LABELS, x_test=PIXELS[:2], y_test=LABELS[:2])

    def read(path: Path) -> None:
        open_arrays(path, "train")
        open_arrays(path, "test")

    assert read_each(tmp_path / "a.npz", mutated(image.getvalue(), COUNT), read) > COUNT // 2


@pytest.mark.parametrize(
    ("options", "library"), [({}, "earliest"), ({"chunks": (2, 8, 8, 3), "compression": "gzip"}, "latest")]
)
def test_hdf5_files_of_users(tmp_path: Path, options: dict[str, Any], library: str) -> None:
    image = io.BytesIO()
    with h5py.File(image, "w", libver=library) as file:
        file.attrs["classes"] = ["cat", "dog"]
        for split in ("train", "test"):
            file.create_dataset(f"{split}/images", data=PIXELS, **options)
            file[f"{split}/labels"] = LABELS

    def read(path: Path) -> None:
        open_arrays(path, "train")
        open_arrays(path, "test")

    assert read_each(tmp_path / "a.h5", mutated(image.getvalue(), COUNT), read) > COUNT // 4


@pytest.mark.parametrize("harm", [(0, 0), (1 << 15, 8), (3, 1 << 40)])
def test_a_heap_of_texts_that_would_hold_the_library_up(tmp_path: Path, harm: tuple[int, int]) -> None:
    """harm: number and length of the heap's first entry; the library never ends with none of no length."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.attrs["classes"] = ["cat", "dog"]
        for split in ("train", "test"):
            file[f"{split}/images"], file[f"{split}/labels"] = PIXELS, LABELS
    assert open_arrays(path, "train").class_names == ("cat", "dog")
    content = bytearray(path.read_bytes())
    entry = content.index(b"GCOL") + 16
    content[entry : entry + 2] = harm[0].to_bytes(2, "little")
    content[entry + 8 : entry + 16] = harm[1].to_bytes(8, "little")
    path.write_bytes(content)
    if harm[1] == 8:  # another number, for the same three letters
        with pytest.raises(DataError, match=r"a\.h5: "):
            open_arrays(path, "train")
    else:
        with pytest.raises(DataError, match=r"a\.h5: a heap of its texts is damaged"):
            open_arrays(path, "train")


@pytest.mark.parametrize("encoding", ["pixels", "original"])
def test_packed_files(tmp_path: Path, encoding: str) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.fromarray(PIXELS[0]).save(folder / "0.png")
    whole = tmp_path / "whole.h5"
    pack_by_name("image_folder", tmp_path / "images", whole, encoding=encoding)

    def read(path: Path) -> None:
        open_packed(path, "train")
        open_packed(path, "test")
        describe(path)

    assert read_each(tmp_path / "p.h5", mutated(whole.read_bytes(), COUNT), read) > COUNT // 4


def test_plans(tmp_path: Path) -> None:
    plan = SkipPlan.dense(2, 2, 2, 3)
    plan.write(tmp_path / "whole.h5")
    copies = mutated((tmp_path / "whole.h5").read_bytes(), COUNT)
    assert read_each(tmp_path / "plan.h5", copies, SkipPlan.read) > COUNT // 4
    said = [
        told(lambda body=body: SkipPlan.from_bytes(body + hashlib.sha256(body).digest()))
        for body in mutated(plan.to_bytes()[:-32], COUNT)
    ]
    assert 0 < max(map(len, said)) < 500


def test_results(tmp_path: Path) -> None:
    with results.ResultsWriter(tmp_path / "whole.h5") as writer:
        writer.put("config", {"yaml": "model:\n  name: vit_tiny\n"})
        writer.put("environment", {}, {"world_size": 1, "torch": "2.6"})
        for step in range(3):
            writer.append("evaluations", {"step": step, "accuracy": 0.5})
    copies = mutated((tmp_path / "whole.h5").read_bytes(), COUNT)

    def read(path: Path) -> None:
        with results.open(path) as run:
            run.table("evaluations")
            run.attributes("environment")

    assert read_each(tmp_path / "results.h5", copies, read) > COUNT // 4


@pytest.mark.parametrize("which", ["links", "first", "last"])
def test_segments_of_a_run_that_goes_on(which: str, tmp_path: Path) -> None:
    whole, going_on = tmp_path / "results.h5", tmp_path / "results.segments"
    with results.ResultsWriter(whole, flush_seconds=0) as writer:
        writer.put("config", {"yaml": "model:\n  name: vit_tiny\n"}, {"attribute": 1})
        for step in range(9):
            writer.append("evaluations", {"step": step, "accuracy": 0.5, "class_accuracy": np.ones(9) / 3})
        copied = tmp_path / "copied"
        shutil.copytree(going_on, copied / going_on.name)
        shutil.copy(whole, copied)
    with h5py.File(copied / whole.name) as file:
        segments = file.attrs["segments"].decode().split()
    assert len(segments) > 1
    segment = copied / going_on.name / segments[0 if which == "first" else -1]
    damaged = copied / whole.name if which == "links" else segment

    def read(path: Path) -> None:
        with results.open(copied) as run:
            run.contents()
            assert run.config

    assert not told(lambda: read(damaged))
    copies = mutated(damaged.read_bytes(), COUNT)
    assert read_each(damaged, copies, read, words=str(copied)) > COUNT // 4


def test_launches(tmp_path: Path) -> None:
    """Nothing in them is believed; what was there stays, and the next start has a line of its own."""
    config = read_config(Path("configs/demo.yaml"), [f"run.folder={tmp_path}"])
    record_launch(config, SoloControl(), {}, "the beginning")
    launches = config.run_folder / LAUNCHES
    for copy in mutated(launches.read_bytes(), COUNT):
        launches.write_bytes(copy)
        check_ours(config.run_folder)
        record_launch(config, SoloControl(), {}, "step 5")
        content = launches.read_bytes()
        assert content.startswith(copy)
        assert json.loads(content.splitlines()[-1])["start"] == "step 5"


def test_weights(tmp_path: Path) -> None:
    state = {name: 3 * torch.ones(4, 4) for name in ("one", "other")}
    model = torch.nn.ParameterDict(state)
    whole = serialize({name: value.data for name, value in state.items()}, {"format": "pt"})

    def read(path: Path) -> None:
        find_weights(str(path))
        check_complete(path, model, "a model")

    path = tmp_path / "a.safetensors"
    assert read_each(path, mutated(whole, COUNT), read) > COUNT // 4


@pytest.mark.parametrize("which", ["model.safetensors", "optimizer.safetensors"])
def test_training_states(which: str, tmp_path: Path) -> None:
    state = PortableState(
        {"a": torch.ones(4, 4)}, {"exp_avg": {"a": torch.ones(4, 4)}}, {"step": 5.0}, {"last_epoch": 5}
    )
    state.write(tmp_path, write_file)
    assert PortableState.read(tmp_path).numbers == state.numbers
    copies = mutated((tmp_path / which).read_bytes(), COUNT)
    refused = read_each(
        tmp_path / which, copies, lambda path: PortableState.read(path.parent), words=str(tmp_path)
    )
    assert refused > COUNT // 4


def test_configurations(tmp_path: Path) -> None:
    content = Path("configs/demo.yaml").read_bytes()
    said = []
    for copy in mutated(content, COUNT):
        (tmp_path / "config.yaml").write_bytes(copy)
        said += [told(lambda: read_config(tmp_path / "config.yaml")), told(lambda: saved_config(tmp_path))]
    assert len([text for text in said if text]) > COUNT // 2
    assert max(len(line) for text in said for line in text.splitlines()) < 500


def test_positions(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000005"
    folder.mkdir()
    whole = b'{"steps_done": 5, "epochs_done": 1, "batches_done": 2, "rows": 12}'
    copies = mutated(whole, COUNT)
    refused = read_each(folder / POSITION, copies, lambda path: read_position(path.parent), words=str(folder))
    assert refused > COUNT // 2
