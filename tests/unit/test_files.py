"""Files are written whole and synced; what others wrote is read within limits, and nothing outside of it."""

from __future__ import annotations

import io
import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.files import atomic, hdf5
from d2ft_hpc.files.untrusted import RefusedError, read_bytes, read_json
from d2ft_hpc.lifecycle.costs import PlanCosts
from d2ft_hpc.model.weights import find_weights
from d2ft_hpc.parallel.rank_layout import Placement, RankLayout


def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    atomic.write(path, "ä: 1\n")
    with pytest.raises(OSError, match="no space"), atomic.replaced(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise OSError("no space")
    assert path.read_text(encoding="utf-8") == "ä: 1\n"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_file_is_on_disk_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves cannot be tried here; the order of the calls can."""
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def watched_rename(old: Path, new: Path) -> None:
        calls.append(("rename", Path(new).name))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_rename)
    atomic.write(tmp_path / "a", b"content")
    assert calls == [("sync", ".a.tmp"), ("rename", "a"), ("sync", tmp_path.name)]
    calls.clear()
    building = tmp_path / "step.building"
    (building / "part").mkdir(parents=True)
    (building / "part" / "b").write_bytes(b"content")
    atomic.replace_folder(building, tmp_path / "step")
    assert set(calls[:3]) == {("sync", "step.building"), ("sync", "part"), ("sync", "b")}
    assert calls[3:] == [("rename", "step"), ("sync", tmp_path.name)]
    assert (tmp_path / "step" / "part" / "b").read_bytes() == b"content"


def test_a_line_that_was_cut_short_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "launches.jsonl"
    atomic.append_line(path, "first")
    with path.open("a") as file:
        file.write('{"half')
    atomic.append_line(path, "third")
    assert path.read_text().splitlines() == ["first", '{"half', "third"]


def test_small_files_are_regular_and_small(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(1025))
    (tmp_path / "deep").write_bytes(b"[" * 10**6)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "list").write_bytes(b"[1]")
    for path, reason in (("pipe", "regular"), ("large", "larger than 1 KiB")):
        with pytest.raises(RefusedError, match=reason):
            read_bytes(tmp_path / path, 1024)
    with pytest.raises(RefusedError, match="regular"):
        read_bytes(Path("/dev/zero"), 1024)
    with pytest.raises(RefusedError, match="regular"):
        hdf5.open_file(tmp_path / "pipe")
    for path, reason in (("deep", "no JSON"), ("empty", "is empty"), ("list", "no JSON object")):
        with pytest.raises(RefusedError, match=reason):
            read_json(tmp_path / path)


def numbers() -> Any:
    return np.arange(3 * 1000 * 7, dtype=np.float64).reshape(3, 1000, 7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (2, 300, 7)},
        {"chunks": (2, 300, 4), "compression": "gzip"},
        {"chunks": (1, 1000, 7), "compression": "gzip", "shuffle": True, "dtype": ">f4"},
        {"chunks": (3, 170, 7), "shuffle": True, "dtype": "i2"},
    ],
)
def test_pieces_are_unpacked_as_the_library_does(tmp_path: Path, options: dict[str, Any]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=numbers().astype(options.pop("dtype", "f8")), **options)
    with h5py.File(tmp_path / "a.h5") as file:
        read = hdf5.read_array(file["a"], hdf5.Allowance(0))
        assert read.dtype == file["a"].dtype
        np.testing.assert_array_equal(read, file["a"][()])


def bomb_in_one_piece(file: h5py.File) -> None:
    """1 KiB is declared, and 100 MB is what the stream unpacks to."""
    data = file.create_dataset("a", (128,), "f8", chunks=(128,), compression="gzip")
    data.id.write_direct_chunk((0,), zlib.compress(bytes(10**8)))


def stream_cut_short(file: h5py.File) -> None:
    data = file.create_dataset("a", (128,), "f8", chunks=(128,), compression="gzip")
    data.id.write_direct_chunk((0,), zlib.compress(bytes(1024))[:-3])


def missing_piece(file: h5py.File) -> None:
    file.create_dataset("a", (1000,), "f8", chunks=(500,), compression="gzip")[:500] = 1


def millions_of_pieces(file: h5py.File) -> None:
    file.create_dataset("a", (10**8,), "u1", chunks=(1,), compression="gzip")


def bomb_over_all(file: h5py.File) -> None:
    file.create_dataset("a", (2**31,), "u1", chunks=(2**20,), compression="gzip")


def larger_than_its_file(file: h5py.File) -> None:
    file.create_dataset("a", (10**6,), "f8")


def larger_piece_than_data(file: h5py.File) -> None:
    file.create_dataset("a", (8,), "u1", maxshape=(None,), chunks=(2**31,), compression="gzip")


@pytest.mark.parametrize(
    "harm",
    [
        bomb_in_one_piece,
        stream_cut_short,
        missing_piece,
        millions_of_pieces,
        bomb_over_all,
        larger_than_its_file,
        larger_piece_than_data,
    ],
)
def test_what_a_dataset_claims_is_checked_before_it_is_unpacked(tmp_path: Path, harm: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        harm(file)
    with hdf5.open_file(tmp_path / "a.h5") as file, pytest.raises(RefusedError):
        hdf5.read_array(hdf5.child(file, "a"), hdf5.Allowance(file.id.get_filesize()))


def test_attributes_are_few_small_and_of_fixed_length() -> None:
    def refused(**attributes: Any) -> None:
        image = io.BytesIO()
        with h5py.File(image, "w", libver="v110") as file:
            for name, value in attributes.items():
                file.attrs[name] = value
        with h5py.File(image, "r") as file, pytest.raises(RefusedError):
            hdf5.read_attributes(file)

    refused(a="of variable length")
    refused(a=np.bytes_(b"x" * (1 << 20) + b"x"))
    refused(a=np.zeros(3))
    refused(**{f"a{i}": i for i in range(1500)})


def test_a_placement_places_every_block_once(tmp_path: Path) -> None:
    path, layout = tmp_path / "placement.json", RankLayout(2, 1, 2, 0)
    whole = {"stages": [[0, 2], [2, 3]], "owner": [[0, 1], [0, 1], [1, 0]]}
    for harm in (
        {},
        {"stages": [[0, 2], [1, 3]]},
        {"stages": [[0, 10**18]]},
        {"stages": [[0, 10**30]]},
        {"stages": [[0, 3], [3, 3]]},
        {"stages": []},
        {"owner": [[0, -1], [0, 1], [1, 0]]},
        {"owner": "ab"},
        {"owner": [[0, 1], [0], [1, 0]]},
    ):
        path.write_text(json.dumps({**whole, **harm}))
        if not harm:
            assert Placement.read(path, layout).stages == [range(2), range(2, 3)]
            continue
        with pytest.raises(CheckpointError, match=r"placement\.json: not the placement"):
            Placement.read(path, layout)


@pytest.mark.parametrize(
    "harm",
    [
        {"device_speed": [0.0]},
        {"device_speed": "1"},
        {"forward_share": -1.0},
        {"always_share": float("nan")},
    ],
)
def test_costs_that_cannot_be_are_refused(harm: dict[str, Any]) -> None:
    whole = {"forward_share": 0.4, "always_share": 0.1, "device_speed": [1.0], "source": "flops"}
    assert PlanCosts.parse(json.dumps({**whole, "most_full": [float("inf")]}).encode()).most_full == [
        float("inf")
    ]
    with pytest.raises(RefusedError):
        PlanCosts.parse(json.dumps({**whole, **harm}).encode())


def test_weights_that_are_no_regular_file_or_not_described_by_numbers(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        find_weights(str(tmp_path / "model.safetensors"))
    for text in ('{"mean": [1, 2]}', '{"std": [0.1, 0, 0.1]}', '{"std": [NaN]}', '{"mean": "abc"}', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: not a readable description"):
            find_weights(str(tmp_path))


def test_files_of_a_run_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    atomic.write(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)
