"""Every file that a user or a stranger may hand over, damaged at random: it is read, or refused in one short line."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from d2ft_hpc import results
from d2ft_hpc.config import load_config
from d2ft_hpc.data.arrays import open_arrays
from d2ft_hpc.data.packed import describe, open_packed
from d2ft_hpc.data.packing import pack_by_name
from d2ft_hpc.errors import D2ftError, DataError
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.training.checkpoint import POSITION, read_position
from d2ft_hpc.training.run_folder import read_config
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


def test_configurations(tmp_path: Path) -> None:
    content = Path("configs/demo.yaml").read_bytes()
    said = []
    for copy in mutated(content, COUNT):
        (tmp_path / "config.yaml").write_bytes(copy)
        said += [told(lambda: load_config(tmp_path / "config.yaml")), told(lambda: read_config(tmp_path))]
    assert len([text for text in said if text]) > COUNT // 2
    assert max(len(line) for text in said for line in text.splitlines()) < 500


def test_positions(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000005"
    folder.mkdir()
    whole = b'{"steps_done": 5, "epochs_done": 1, "batches_done": 2, "rows": 12}'
    copies = mutated(whole, COUNT)
    refused = read_each(folder / POSITION, copies, lambda path: read_position(path.parent), words=str(folder))
    assert refused > COUNT // 2
