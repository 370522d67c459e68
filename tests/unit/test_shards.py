"""Data sets of Hugging Face `datasets` and WebDataset on disk: the images that went in, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2ft_hpc.config import read_config
from d2ft_hpc.data.loader import train_loader
from d2ft_hpc.data.packed import open_packed
from d2ft_hpc.data.packing import pack_by_name
from d2ft_hpc.data.sampler import MicroBatchSampler
from d2ft_hpc.data.sources import open_source
from d2ft_hpc.errors import DataError
from d2ft_hpc.launch.control import SoloControl
from d2ft_hpc.training.job import set_up
from tests.splits import open_images
from tests.unit.test_data import assert_same

NAMES = ("ant", "bee", "cat")
COUNTS = {"train": 9, "test": 4}


def picture(index: int) -> bytes:
    """A PNG or JPEG file, all different and of different sizes."""
    pixels = np.random.default_rng(index).integers(0, 256, (12 + index, 14, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG" if index % 2 else "PNG")
    return file.getvalue()


FILES = {"train": [picture(i) for i in range(9)], "test": [picture(i) for i in range(20, 24)]}
LABELS = {split: [i % 3 for i in range(count)] for split, count in COUNTS.items()}


def hugging_face(features: Any = None, **columns: Any) -> Any:
    """A DatasetDict of both splits, or of these columns in both."""
    datasets = pytest.importorskip("datasets", reason="needs pip install 'd2ft-hpc[datasets]'")
    datasets.disable_progress_bars()
    if columns:
        one = datasets.Dataset.from_dict(columns, features=features)
        return datasets.DatasetDict(train=one, test=one)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"img": [{"bytes": file, "path": None} for file in FILES[split]], "label": LABELS[split]},
                features=features,
            )
            for split in FILES
        }
    )


def save(root: Path) -> None:
    hugging_face().save_to_disk(root)


def save_in_parts(root: Path) -> None:
    hugging_face().save_to_disk(root, num_shards={"train": 3, "test": 1})


def save_parquet(root: Path) -> None:
    (root / "data").mkdir(parents=True)
    for split, table in hugging_face().items():
        name = "validation" if split == "test" else split
        for part in range(2):
            table.shard(2, part, contiguous=True).to_parquet(
                root / f"data/{name}-0000{part}-of-00002.parquet"
            )


def save_arrow(root: Path) -> None:
    save(root.with_name("saved"))
    for split in FILES:
        (root / split).mkdir(parents=True)
        (file,) = root.with_name("saved").glob(f"{split}/*.arrow")
        shutil.copy(file, root / split / "part.arrow")


def save_shards(root: Path) -> None:
    wds = pytest.importorskip("webdataset", reason="needs pip install 'd2ft-hpc[webdataset]'")
    root.mkdir()
    for split, files in FILES.items():
        name = "validation" if split == "test" else split
        with wds.ShardWriter(str(root / f"mine-{name}-%03d.tar"), maxcount=4, verbose=0) as sink:
            for index, (file, label) in enumerate(zip(files, LABELS[split], strict=True)):
                kind = "image.jpg" if index % 2 else "png"
                sink.write({"__key__": f"a/{index:03d}", kind: file, "cls": label, "json": {"kept": False}})


WAYS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "saved": ("huggingface", save),
    "saved in parts": ("huggingface", save_in_parts),
    "parquet": ("huggingface", save_parquet),
    "arrow": ("huggingface", save_arrow),
    "tar": ("webdataset", save_shards),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs pip install 'd2ft-hpc[datasets]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("way", WAYS)
def test_the_files_bytes_and_labels_come_back_and_are_packed(way: str, tmp_path: Path) -> None:
    name, write = WAYS[way]
    root = tmp_path / "data"
    write(root)
    pack_by_name(name, root, tmp_path / "packed.h5")
    for split in ("train", "test"):
        for source in (open_source(name, root, split), open_packed(tmp_path / "packed.h5", split)):
            assert [source.images.look_at(index) for index in range(len(source.images))] == FILES[split]
            assert source.labels.tolist() == LABELS[split]
            assert source.class_names == (NAMES if name == "huggingface" else ("0", "1", "2"))


@pytest.mark.parametrize("way", ["saved", "tar"])
def test_workers_read_the_same_batches(way: str, tmp_path: Path) -> None:
    name, write = WAYS[way]
    write(tmp_path / "data")

    def batches(workers: int) -> list[Any]:
        images = open_images(
            name, root=tmp_path / "data", image_size=16, split="train", augment="resized_crop"
        )
        order = MicroBatchSampler(len(images), micro_batch_size=2, slots=2, replicas=1, replica=0, seed=3)
        return list(train_loader(images, order, num_workers=workers))

    assert_same(batches(0), batches(1))


IMAGE = {"bytes": FILES["train"][0], "path": None}


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"x": [1], "label": [0]}, r"none of its columns \(x, label\) holds images: name .* 'image'"),
        ({"image": [IMAGE]}, r"none of its columns \(image\) holds labels"),
        ({"image": [IMAGE], "label": ["cat"]}, "holds labels"),
        ({"image": [IMAGE], "label": [0.5]}, "holds labels"),
        ({"image": [IMAGE], "fine": [0], "coarse": [0]}, "columns fine, coarse all hold labels"),
        ({"image": [IMAGE], "other": [IMAGE], "label": [-1]}, "labels are -1 to -1"),
        ({"image": [IMAGE, IMAGE], "label": [0, None]}, "each needs one whole number"),
        ({"image": [{"bytes": b"junk", "path": None}], "label": [0]}, "image 0 of .*not a readable image"),
        ({"image": [{"bytes": None, "path": __file__}], "label": [0]}, "image 0 of .* is a path or absent"),
    ],
)
def test_tables_that_are_refused(columns: dict[str, list[Any]], told: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    stored = {
        "bytes": datasets.Value("binary"),
        "path": datasets.Value("string"),
    }  # never a file that it names
    kinds = {"image": stored, "other": stored, "label": None, "fine": None, "coarse": None, "x": None}
    values = {str: "string", float: "float64", int: "int64"}
    features = {
        name: kinds[name] or datasets.Value(values[type(given[0])]) for name, given in columns.items()
    }
    hugging_face(datasets.Features(features), **columns).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=rf"data/train.*{told}|{told}"):
        pack_by_name("huggingface", tmp_path / "data", tmp_path / "packed.h5")
    assert not (tmp_path / "packed.h5").exists()


def put_tar(file: Path, *members: tuple[str, bytes]) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


PNG = FILES["train"][0]


@pytest.mark.parametrize("name", ["huggingface", "webdataset"])
@pytest.mark.parametrize("label", [1, 12], ids=["in the midst", "beyond"])
def test_labels_of_the_test_that_no_image_for_training_has_are_refused(
    name: str, label: int, tmp_path: Path
) -> None:
    labels = {"train": [0, 3, 2], "test": [label, 0]}
    if name == "huggingface":
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        tables = {
            split: datasets.Dataset.from_dict(
                {"image": [{"bytes": PNG, "path": None}] * len(each), "label": each}, features=features
            )
            for split, each in labels.items()
        }
        datasets.DatasetDict(tables).save_to_disk(tmp_path / "data")
    else:
        pytest.importorskip("webdataset", reason="needs pip install 'd2ft-hpc[webdataset]'")
        for split, each in labels.items():
            members = [
                (f"{key}.{kind}", content)
                for key, own in enumerate(each)
                for kind, content in (("png", PNG), ("cls", str(own).encode()))
            ]
            put_tar(tmp_path / f"data/{split}.tar", *members)
    with pytest.raises(DataError, match=rf"data: .* same classes; test has labels .*: {label}$"):
        pack_by_name(name, tmp_path / "data", tmp_path / "packed.h5")
    assert not (tmp_path / "packed.h5").exists()


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([], "holds no sample"),
        ([("README", b"")], "holds no sample"),
        ([("a.png", PNG)], r"sample a has no a\.cls"),
        ([("a.cls", b"0")], "sample a holds 0 images"),
        ([("a.png", PNG), ("a.jpg", PNG), ("a.cls", b"0")], "sample a holds 2 images"),
        ([("a.png", PNG), ("a.png", PNG), ("a.cls", b"0")], "duplicate file name"),
        ([("a.png", PNG), ("b.png", PNG), ("a.cls", b"0")], r"sample a has no a\.cls"),
        ([("a.png", PNG), ("a.cls", b"cat")], r"a\.cls holds b'cat'"),
        ([("a.png", PNG), ("a.cls", b"-1")], r"a\.cls holds b'-1'"),
        ([("a.png", PNG), ("a.cls", b"9" * 99)], r"a\.cls holds b'9999"),
        ([("a.png", PNG), ("a.cls", b"9" * 19)], r"a\.cls holds b'9999"),
        ([("a.png", PNG), ("a.cls", b"9" * 9)], "data: labels go up to 999999999"),
        ([("a.png", b"junk"), ("a.cls", b"0")], r"a\.png in .*train\.tar: not a readable image"),
    ],
)
def test_shards_that_are_refused(members: list[tuple[str, bytes]], told: str, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs pip install 'd2ft-hpc[webdataset]'")
    for split in ("train", "test"):
        put_tar(tmp_path / f"data/{split}.tar", *members)
    with pytest.raises(DataError, match=told):
        pack_by_name("webdataset", tmp_path / "data", tmp_path / "packed.h5")


class Attack:
    def __reduce__(self) -> Any:
        return os.abort, ()


def test_what_is_neither_image_nor_class_is_not_read(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs pip install 'd2ft-hpc[webdataset]'")
    harm = pickle.dumps(Attack())
    put_tar(tmp_path / "data/train.tar", ("a.png", PNG), ("a.pyd", harm), ("a.pth", harm), ("a.cls", b"0"))
    source = open_source("webdataset", tmp_path / "data", "train")
    assert source.images.look_at(0) == PNG


@pytest.mark.parametrize("way", WAYS)
def test_damaged_files_are_named(way: str, tmp_path: Path) -> None:
    name, write = WAYS[way]
    root = tmp_path / "data"
    write(root)
    endings = (".arrow", ".parquet", ".tar")
    shards = [path for path in root.rglob("*") if path.suffix in endings]
    file = min(path for path in shards if "train" in str(path.relative_to(root)))
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(DataError, match=r"train.*(cannot be read|cut short)"):
        open_source(name, root, "train")


def test_folders_without_the_split_s_files(tmp_path: Path) -> None:
    for name, kind in (("huggingface", "parquet"), ("webdataset", "tar")):
        with pytest.raises(DataError, match="nowhere: no such folder"):
            open_source(name, tmp_path / "nowhere", "train")
        (tmp_path / f"other.{kind}").touch()
        with pytest.raises(DataError, match=rf"\*\.{kind}.* is named by train"):
            open_source(name, tmp_path, "train")
    hugging_face()["train"].save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match="one Dataset without splits"):
        open_source("huggingface", tmp_path / "one", "train")


def test_files_of_two_kinds_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "data"
    save_arrow(root)
    hugging_face()["train"].to_parquet(root / "train" / "more.parquet")
    with pytest.raises(DataError, match=r"train/more\.parquet and 1 more: some are parquet and some arrow"):
        open_source("huggingface", root, "train")


def test_splits_whose_labels_differ_in_meaning_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = hugging_face()
    turned = datasets.ClassLabel(names=["ant", "cat", "bee"])
    splits["test"] = datasets.Dataset.from_dict(
        splits["test"].to_dict(), features=datasets.Features(splits["test"].features | {"label": turned})
    )
    splits.save_to_disk(tmp_path / "data")
    asked = [
        "data.name=huggingface",
        f"data.root={tmp_path / 'data'}",
        "data.classes=null",
        "engine.name=plain",
    ]
    config = read_config(Path("configs/demo.yaml"), [*asked, "data.micro_batch_size=1", "data.slots=1"])
    told = "class 1 is 'bee' in the training images and 'cat' in the test images; both need the same classes"
    with pytest.raises(DataError, match=rf"data: {told}"):
        set_up(config, SoloControl(), torch.device("cpu"))
