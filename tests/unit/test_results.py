"""The results file while it is written, after kills, on full disks, and from hostile hands."""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from d2ft_hpc.data.packed import open_packed
from d2ft_hpc.errors import DataError, PlanError, ResultsError
from d2ft_hpc.files import hdf5, kinds
from d2ft_hpc.files.untrusted import RefusedError
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.results import ResultsWriter, columns, open_run, run_lock
from d2ft_hpc.results.hdf5_layout import rank_file
from d2ft_hpc.results.schema import TABLES
from d2ft_hpc.results.superseded import BEFORE_ALL, open_record
from tests import results_reference

RANKS = 2
KILLS = int(os.environ.get("D2FT_KILLS", "8"))  # `make soak-results` asks for more


def step_row(step, ranks=RANKS):
    per_rank = {
        name: np.full(ranks, step, field.kind) for name, field in TABLES["steps"].items() if field.axes
    }
    return {"step": step, "epoch": 0, "plan": 0, "loss": 1.0 / (step + 1), "samples": 8, **per_rank}


def write_run(path, steps=10, **options):
    with ResultsWriter(path, **options) as writer:
        writer.put("config", {"yaml": "model:\n  name: vit_tiny\n"})
        writer.put("environment", {}, {"world_size": RANKS, "torch": "2.6"})
        operations = np.full((4, 3, 2), 2, np.uint8)
        writer.append("plans", {"step": 0, "operations": operations, "gap": 0.25, "solve_seconds": 2.0})
        scores = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
        writer.append("scores", {"step": 0, "forward": scores, "backward": 2 * scores, "seconds": 1.0})
        for step in range(steps):
            writer.append("steps", step_row(step))
        confusion = np.array([[3, 1], [0, 4]])
        writer.append("evaluations", {"step": steps, "accuracy": 0.5, "confusion": confusion})
        writer.append(
            "events", {"step": 0, "kind": "plan", "text": "grüße", "time": "2025-01-01T00:00:00+00:00"}
        )
    return path


def check_plain(path, at_least=0, locking=None):
    """Plain h5py finds whole tables whose every value is the one written; returns the number of steps."""
    with h5py.File(path, "r", locking=locking) as file:
        assert file.attrs["format"] == b"d2ft-hpc results"
        for table, fields in TABLES.items():
            assert len({file[f"{table}/{name}"].shape[0] for name in fields if name in file[table]}) <= 1
        if "step" not in file["steps"]:
            assert at_least == 0
            return 0
        steps = file["steps/step"][:]
        np.testing.assert_array_equal(steps, np.arange(len(steps)))
        np.testing.assert_array_equal(file["steps/loss"][:], 1.0 / (steps + 1))
        assert (file["steps/step_seconds"][:] == steps[:, None]).all()
        assert len(steps) >= at_least
        return len(steps)


@pytest.mark.parametrize("flush_seconds", [0.0, 1e9])
def test_what_was_written_is_read(tmp_path, flush_seconds):
    path = write_run(tmp_path / "new" / "results.h5", flush_seconds=flush_seconds)
    assert [p.name for p in path.parent.iterdir()] == ["results.h5"]
    assert check_plain(path) == 10
    with open_run(path.parent) as run:
        assert run.complete
        assert run.config == {"model": {"name": "vit_tiny"}}
        assert run.attributes("environment") == {"world_size": 2, "torch": "2.6"}
        assert run.attributes("model") == {}
        assert run.plan(0).dtype == np.uint8
        assert run.plan(0).tolist() == np.full((4, 3, 2), 2).tolist()
        assert run.table("plans", ["gap", "solve_seconds"]) == {"gap": [0.25], "solve_seconds": [2.0]}
        assert run.score(0, "backward")[3, 2, 1] == 46
        assert run.table("evaluations")["confusion"].tolist() == [[[3, 1], [0, 4]]]
        assert run.table("evaluations")["class_accuracy"].shape == (1, 0)  # left out
        assert run.table("events")["text"].tolist() == ["grüße"]
        assert np.isnan(run.table("steps")["learning_rate"]).all()  # left out
        assert run.table("evaluations")["samples"].tolist() == [-1]
        assert run.units("steps", "bytes_sent") == "B"
        # 1 s of scores and 2 s of planning before the first step, then steps of 0, 1, 2, ... s
        assert run.elapsed_seconds(np.array([0, 1, 4])).tolist() == [0.0, 3.0, 9.0]


def test_every_dataset_has_units_and_a_description(tmp_path):
    path = write_run(tmp_path / "results.h5")
    seen = []

    def look(name, item):
        if isinstance(item, h5py.Dataset):
            seen.append(name)
            assert item.attrs["units"]
            assert item.attrs["description"]

    with h5py.File(path) as file:
        file.visititems(look)
        for column in (*file["steps"], "step_seconds"):
            scales = [file["steps"][column].dims[i] for i in range(file["steps"][column].ndim)]
            assert column == "step" or all(len(scale) == 1 for scale in scales)
        assert file["plans/operations"].dims[2].keys() == ["block"]
    assert {"steps/loss", "plans/operations", "scores/forward", "events/text", "config/yaml", "rank"} < set(
        seen
    )


@pytest.mark.parametrize("name", ["results.h5", "50%b.h5", "grün rot.h5", "v1.2"])
def test_file_names_that_hdf5_treats_specially(tmp_path, name):
    writer = ResultsWriter(tmp_path / name, flush_seconds=0)
    for step in range(5):
        writer.append("steps", step_row(step))
    assert check_plain(tmp_path / name) == 5
    with open_run(tmp_path / name) as run:
        assert len(run.table("steps")["step"]) == 5
    writer.close()
    assert check_plain(tmp_path / name) == 5


def test_number_of_segments_grows_with_the_logarithm(tmp_path):
    writer = ResultsWriter(tmp_path / "results.h5", flush_seconds=0)
    for step in range(20):
        writer.append("steps", step_row(step))
        with h5py.File(writer.path) as file:
            assert len(file.attrs["segments"].split()) <= 5
    assert check_plain(writer.path) == 20
    writer.close()


def test_rows_reach_the_file_within_the_flush_interval(tmp_path):
    with ResultsWriter(tmp_path / "results.h5", flush_seconds=0.2) as writer:
        for step in range(3):
            appended = time.monotonic()
            writer.append("steps", step_row(step))
            while check_plain(writer.path, locking=False) <= step:
                assert time.monotonic() - appended < 10
                time.sleep(0.02)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda w: w.append("steps", {"step": 0, "los": 1.0}), "did you mean 'loss'"),
        (lambda w: w.append("step", {"step": 0}), "did you mean 'steps'"),
        (lambda w: w.append("steps", {"loss": 1.0}), "`step`"),
        (lambda w: w.append("steps", {"step": 1.5}), r"steps\.step = 1\.5"),
        (lambda w: w.append("steps", {"step": 0, "loss": "low"}), r"steps\.loss = 'low'"),
        (lambda w: w.append("steps", {"step": 0, "loss": [1.0, 2.0]}), "a single number"),
        (
            lambda w: w.append("steps", {"step": 0, "step_seconds": [1, 2], "bytes_sent": [1]}),
            "different lengths",
        ),
        (lambda w: w.put("modell", {}), "did you mean 'model'"),
        (lambda w: w.put("config", {"yam": "a: 1"}), "did you mean 'yaml'"),
        (
            lambda w: w.append("plans", {"step": 0, "operation": np.zeros((1, 1, 1), np.uint8)}),
            "did you mean 'operations'",
        ),
        (
            lambda w: w.append("plans", {"step": 0, "operations": np.zeros(3, np.uint8)}),
            r"\[row, block, head\]",
        ),
        (lambda w: w.put("model", {}, {"bound": None}), "model@bound = None"),
    ],
)
def test_what_the_schema_does_not_have_is_refused_by_name(tmp_path, write, message):
    with ResultsWriter(tmp_path / "results.h5") as writer, pytest.raises(ResultsError, match=message):
        write(writer)
    with open_run(tmp_path) as run:  # nothing half-written came of it
        assert len(run.table("steps")["step"]) == 0


def test_hostile_text_is_stored(tmp_path):
    with ResultsWriter(tmp_path / "results.h5") as writer:
        writer.append("events", {"step": 0, "kind": "a\0b", "text": "\udcff" + "x" * 100_000})
        writer.put("model", {}, {"name": "a\0b"})
    with open_run(tmp_path) as run:
        assert run.table("events")["kind"].tolist() == ["a\\0b"]
        assert run.table("events")["text"][0].startswith("\\udcffxxx")
        assert run.attributes("model") == {"name": "a\\0b"}


def test_an_existing_file_is_not_overwritten(tmp_path):
    path = write_run(tmp_path / "results.h5")
    with pytest.raises(ResultsError, match=r"not overwritten.*resume"):
        ResultsWriter(path)
    assert check_plain(path) == 10


def test_an_exception_keeps_what_was_computed(tmp_path):
    with pytest.raises(RuntimeError, match="loss is NaN"), ResultsWriter(tmp_path / "results.h5") as writer:  # noqa: PT012
        writer.append("steps", step_row(0))
        raise RuntimeError("loss is NaN")
    assert check_plain(writer.path) == 1
    with open_run(tmp_path) as run:
        assert not run.complete


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_resume_continues_after_the_checkpoint(tmp_path, how):
    path = tmp_path / "results.h5"
    writer = ResultsWriter(path, flush_seconds=0)
    writer.put("config", {"yaml": "a: 1"})
    writer.put("environment", {}, {"device": "old"})
    for step in range(6):
        writer.append("steps", step_row(step))
        writer.append("events", {"step": step, "kind": "e" * step})
    if how == "closed":
        writer.close()
    else:
        writer._release()  # the lock ends with the process
    with open_run(path) as run:
        created = run.created

    with ResultsWriter.resume(path, last_step=3, flush_seconds=0) as writer:
        assert check_plain(path) == 4
        with open_run(path) as run:
            assert not run.complete
        writer.put("environment", {}, {"device": "new"})
        for step in range(4, 7):
            writer.append("steps", step_row(step))
        assert len(list((tmp_path / "results.segments").iterdir())) <= 10  # the old ones went
    assert check_plain(path) == 7
    with open_run(path) as run:
        assert run.complete
        assert run.created == created
        assert run.config == {"a": 1}
        assert run.attributes("environment") == {"device": "new"}
        assert run.table("events")["kind"].tolist() == ["e" * step for step in range(5)]
    assert [p.name for p in tmp_path.iterdir()] == ["results.h5"]


def test_a_run_has_one_writer(tmp_path):
    with (
        ResultsWriter(tmp_path / "results.h5") as writer,
        pytest.raises(ResultsError, match="another process writes this run"),
    ):
        ResultsWriter.resume(writer.path, last_step=0)
    with pytest.raises(ResultsError, match="closed"):
        writer.append("steps", step_row(0))


def test_who_looks_whether_a_run_goes_on_keeps_no_writer_off(tmp_path, monkeypatch):
    with ResultsWriter(tmp_path / "results.h5") as writer:
        with open_run(writer.path) as run:
            assert run.goes_on
        writer._release()
        with open_run(writer.path) as run:
            assert not run.goes_on
        looking = os.open(tmp_path / "results.segments" / "lock", os.O_RDONLY)
        fcntl.flock(looking, fcntl.LOCK_SH)  # as a reader does, for an instant
        monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: os.close(looking))
        writer._lock = run_lock.lock(writer.path)
        assert run_lock.is_locked(writer.path)
    with open_run(writer.path) as run:
        assert not run.goes_on


def write_rank(path, rank, steps, **options):
    with ResultsWriter(rank_file(path, rank), **options) as writer:
        for step in steps:
            values = {"rank_loss": step + rank / 10, "rank_samples": 4, "communication_seconds": 1 + rank}
            writer.append("steps", {"step": step, "step_seconds": step + 100 * rank, **values})


def test_a_file_for_each_rank(tmp_path):
    """Rank 1 is behind while the run goes on, and rank 2 has not begun."""
    path = tmp_path / "results.h5"
    main = ResultsWriter(path, flush_seconds=0, rank_files=3)
    writers = [ResultsWriter(rank_file(path, rank), flush_seconds=0) for rank in range(2)]
    for step in range(4):
        main.append("steps", {"step": step, "learning_rate": 0.5})
        for rank, writer in enumerate(writers[: 2 if step < 2 else 1]):
            writer.append("steps", {"step": step, "step_seconds": step + 100 * rank})
    with h5py.File(path) as file:
        expected = [[step, 100 + step if step < 2 else np.nan, np.nan] for step in range(4)]
        np.testing.assert_array_equal(file["steps/step_seconds"][:], expected)
        assert file["steps/learning_rate"].shape == (4,)
    with open_run(path) as run:
        np.testing.assert_array_equal(run.table("steps")["step_seconds"], expected)
    for writer in (main, *writers):
        writer.close()

    with pytest.raises(ResultsError, match="begun with a file for each rank"):
        ResultsWriter.resume(path, last_step=1)
    with ResultsWriter.resume(path, last_step=1, rank_files=3) as main:
        for step in (2, 3):
            main.append("steps", {"step": step, "learning_rate": 0.5})
    shutil.rmtree(rank_file(path, 0).parent)
    for rank in range(3):
        write_rank(path, rank, range(4 - rank))
    with open_run(path) as run:
        steps = run.table("steps")
        nan = np.nan
        assert steps["learning_rate"].tolist() == [0.5] * 4
        expected = [[0, 100, 200], [1, 101, 201], [2, 102, nan], [3, nan, nan]]
        np.testing.assert_array_equal(steps["step_seconds"], expected)
        np.testing.assert_allclose(steps["loss"], [0.1, 1.1, 2.05, 3.0])
        assert steps["samples"].tolist() == [12, 12, 8, 4]
        np.testing.assert_array_equal(steps["waiting_seconds"][0], [0, 1, 2])
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["steps/step_seconds"][:], expected)


def test_a_file_of_another_schema_version_is_refused_with_both_versions(tmp_path):
    for version, fix in ((1, "read it with the package that wrote it"), (3, "update d2ft-hpc")):
        path = tmp_path / f"version{version}.h5"
        with ResultsWriter(path):
            pass
        with h5py.File(path, "r+", locking=False) as file:
            file.attrs["schema_version"] = version
        with pytest.raises(ResultsError, match=rf"its schema version is {version} .*{fix}"):
            open_run(path)


def test_the_schemas_document_is_current():
    document = Path(__file__).parents[2] / "d2ft_hpc" / "results" / "README.md"
    assert document.read_text() == results_reference.document()


def test_pandas_and_xarray(tmp_path):
    pandas, xarray = pytest.importorskip("pandas"), pytest.importorskip("xarray")
    path = write_run(tmp_path / "results.h5", steps=5)
    with open_run(path) as run:
        frame = run.pandas("steps")
        assert frame.index.name == "step"
        assert frame.loc[3, "loss"] == 0.25
        by_rank = run.pandas("steps", by_rank=True)
        assert by_rank.index.names == ["step", "rank"]
        assert by_rank.loc[(4, 1), "step_seconds"] == 4
        assert run.pandas("events").loc[0, "text"] == "grüße"
        dataset = run.xarray("steps")
        assert dict(dataset.sizes) == {"step": 5, "rank": 2}
        assert dataset["step_seconds"].sel(step=3, rank=0) == 3
        assert dataset["step_seconds"].attrs["units"] == "s"
        assert run.xarray("plans")["operations"].dims == ("plan", "row", "block", "head")
    pytest.importorskip("h5netcdf")
    with xarray.open_dataset(path, group="steps", engine="h5netcdf") as alone:  # without this package
        assert dict(alone.sizes) == {"step": 5, "rank": 2}
        assert isinstance(alone["step_seconds"].to_dataframe(), pandas.DataFrame)
        assert alone["step_seconds"].sel(step=3).values.tolist() == [3, 3]
    with xarray.open_dataset(path, group="plans", engine="h5netcdf") as alone:
        assert alone["operations"].sizes == {"plan": 1, "row": 4, "block": 3, "head": 2}


def test_resume_on_more_ranks(tmp_path):
    path = write_run(tmp_path / "results.h5", steps=2)
    with ResultsWriter.resume(path, last_step=1) as writer:
        writer.append("steps", step_row(2, ranks=4))
        writer.flush()
        with h5py.File(path) as file:
            linked = file["steps/step_seconds"][:]
    with open_run(path) as run:
        joined = run.table("steps")["step_seconds"]
    nan = np.nan
    np.testing.assert_array_equal(linked, [[0, 0, nan, nan], [1, 1, nan, nan], [2, 2, 2, 2]])
    np.testing.assert_array_equal(joined, linked)


WRITE_FOREVER = """
import sys
from test_results import step_row
from d2ft_hpc.results import ResultsWriter
path, flush_seconds, close_every = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
writer = ResultsWriter(path, flush_seconds=flush_seconds)
print(-1, flush=True)
for step in range(1_000_000):
    writer.append("steps", step_row(step))
    print(step, flush=True)
    if close_every and step % close_every == close_every - 1:
        writer.close()
        writer = ResultsWriter.resume(path, last_step=step, flush_seconds=flush_seconds)
"""


def own_environment():
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


def start_writer(path, flush_seconds=0.0, close_every=0):
    return subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(path), str(flush_seconds), str(close_every)],
        stdout=subprocess.PIPE,
        text=True,
        env=own_environment(),
    )


@pytest.mark.full
@pytest.mark.parametrize("close_every", [0, 3])
def test_killed_at_random_moments(tmp_path, close_every):
    """With a flush a row, all rows whose `append` returned are there; also if killed in close or resume. Each number of
    segments is as likely as another: they grow with the logarithm of the rows."""
    chance = random.Random(close_every)
    for kill in range(KILLS // 2):
        path = tmp_path / f"{kill}" / "results.h5"
        writer = start_writer(path, close_every=close_every)
        assert writer.stdout is not None
        for _ in range(int(40 ** chance.random())):
            last = int(writer.stdout.readline())
        time.sleep(chance.random() * 0.05)
        writer.send_signal(signal.SIGKILL)
        last = max([last, *(int(line) for line in writer.stdout.read().split("\n")[:-1])])
        writer.wait()
        assert check_plain(path, at_least=last + 1) <= last + 2
        with open_run(path) as run:
            assert len(run.table("steps")["step"]) >= last + 1
        with ResultsWriter.resume(path, last_step=last):
            pass
        assert check_plain(path) == last + 1
        assert [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] == ["results.h5"]


def test_readers_while_writing(tmp_path):
    path = tmp_path / "results.h5"
    writer = start_writer(path)
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        seen = 0
        for _ in range(15):
            last = int(writer.stdout.readline())
            assert check_plain(path, at_least=last + 1) >= seen
            with open_run(path) as run:
                steps = run.table("steps")
                seen = len(steps["step"])
                assert seen >= last + 1
                np.testing.assert_array_equal(steps["loss"], 1.0 / (np.arange(seen) + 1))
    finally:
        writer.kill()
        writer.communicate()


def test_two_readers_while_a_thread_flushes(tmp_path):
    """In processes of their own, plain h5py and this package's reader, all the time that a run writes and ends."""
    path = tmp_path / "results.h5"
    read = (
        "import sys; from test_results import check_plain, open_run\n"
        "seen = reads = 0\n"
        "while sys.stdin.readline() == 'go\\n':\n"
        "    if sys.argv[2] == 'h5py':\n"
        "        now = check_plain(sys.argv[1])\n"
        "    else:\n"
        "        with open_run(sys.argv[1]) as run: now = len(run.table('steps')['step'])\n"
        "    assert now >= seen; seen = now; reads += 1; print(seen, flush=True)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": own_environment()}
    with ResultsWriter(path, flush_seconds=0.02) as writer:
        readers = [
            subprocess.Popen([sys.executable, "-c", read, str(path), how], **pipes)
            for how in ("h5py", "ours")
        ]
        for step in range(600):
            writer.append("steps", step_row(step))
            if step % 50 == 0:
                for reader in readers:
                    reader.stdin.write("go\n")
                    reader.stdin.flush()
            time.sleep(0.001)
        for reader in readers:
            assert len([reader.stdout.readline() for _ in range(12)]) == 12
    for reader in readers:
        last, _ = reader.communicate("go\n")
        assert (reader.returncode, last) == (0, "600\n")


def test_an_open_run_stays_as_it_was(tmp_path):
    writer = ResultsWriter(tmp_path / "results.h5", flush_seconds=0)
    for step in range(3):
        writer.append("steps", step_row(step))
    with open_run(tmp_path) as run:
        for step in range(3, 12):
            writer.append("steps", step_row(step))
        writer.close()
        assert run.table("steps")["step"].tolist() == [0, 1, 2]


def test_a_run_folder_can_be_moved_but_not_torn_apart(tmp_path, monkeypatch):
    writer = ResultsWriter(tmp_path / "here" / "results.h5", flush_seconds=0)
    writer.put("model", {}, {"name": "vit"})
    for step in range(5):
        writer.append("steps", step_row(step))
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir("/")
    assert check_plain(tmp_path / "there" / "results.h5") == 5
    with h5py.File(tmp_path / "there" / "results.h5") as file:
        assert file["model"].attrs["name"] == b"vit"
    with open_run(tmp_path / "there") as run:
        assert run.table("steps")["step"].tolist() == list(range(5))
    shutil.move(tmp_path / "there" / "results.segments", tmp_path / "elsewhere")
    with pytest.raises(ResultsError, match=r"is missing.*results\.segments/ beside the file"):
        open_run(tmp_path / "there")


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ResultsError, match=r"cannot write results to .*file/results\.h5.*choose an output folder"
    ):
        ResultsWriter(tmp_path / "file" / "results.h5")


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        writer = ResultsWriter(disk / "results.h5", flush_seconds=0)
        last = 0
        with pytest.raises(ResultsError, match=r"No space left on device; free space"), writer:  # noqa: PT012
            for last in range(20_000):
                writer.append("steps", step_row(last))
        on_disk = check_plain(writer.path, at_least=last)
        assert on_disk == last > 10
        assert not [p for p in disk.rglob("*") if p.name.endswith(".tmp")]
        with open_run(disk) as run:
            assert len(run.table("steps")["step"]) == on_disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_after_a_full_disk_was_cleared_nothing_is_missing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with ResultsWriter(disk / "results.h5", flush_seconds=0) as writer:
            writer.append("steps", step_row(0))
            with (disk / "ballast").open("wb", buffering=0) as ballast:
                while True:
                    try:
                        ballast.write(bytes(4096))
                    except OSError:
                        break
            for step in range(1, 4):
                with pytest.raises(ResultsError, match="No space left"):
                    writer.append("steps", step_row(step))
            assert check_plain(writer.path) == 1
            (disk / "ballast").unlink()
            writer.append("steps", step_row(4))
        assert check_plain(writer.path) == 5
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def make_linking(folder):
    """A run as a kill leaves it."""
    writer = ResultsWriter(folder / "results.h5", flush_seconds=0)
    writer.put("model", {}, {"name": "vit"})
    for step in range(3):
        writer.append("steps", step_row(step))
    return writer.path


def external_group(file, secret):
    del file["model"]
    file["model"] = h5py.ExternalLink(str(secret), "steps")


def external_table(file, secret):
    del file["steps"]
    file["steps"] = h5py.ExternalLink(str(secret), "steps")


def external_climbing(file, secret):
    del file["model"]
    file["model"] = h5py.ExternalLink(f"results.segments/../../{secret.name}", "steps")


def soft_link(file, secret):
    del file["model"]
    file["model"] = h5py.SoftLink("/steps")


def segment_elsewhere(file, secret):
    file.attrs["segments"] = np.bytes_(f"../{secret.name}")


def text_of_variable_length(file, secret):
    file.attrs["title"] = "a"


def references(file, secret):
    file.attrs["title"] = file["steps"].ref


def array_attribute(file, secret):
    file.attrs["title"] = np.zeros(10)


@pytest.mark.parametrize(
    "harm",
    [
        external_group,
        external_table,
        external_climbing,
        soft_link,
        segment_elsewhere,
        text_of_variable_length,
        references,
        array_attribute,
    ],
)
def test_a_linking_file_that_points_elsewhere_is_refused(tmp_path, harm):
    secret = write_run(tmp_path / "secret.h5", steps=3)
    path = make_linking(tmp_path / "run")
    with h5py.File(path, "r+") as file:
        harm(file, secret)
    with pytest.raises(ResultsError, match="not a results file of this package"):
        open_run(path)


def test_a_virtual_dataset_that_points_elsewhere_is_not_followed(tmp_path):
    with ResultsWriter(tmp_path / "secret.h5") as writer:
        for step in range(3):
            writer.append("steps", {"step": step, "loss": 99.0})
    path = make_linking(tmp_path / "run")
    with h5py.File(path, "r+") as file:
        del file["steps/loss"]
        layout = h5py.VirtualLayout((3,), "f8")
        layout[:] = h5py.VirtualSource("../secret.h5", "steps/loss", (3,))
        file.create_virtual_dataset("steps/loss", layout)
    with h5py.File(path) as file:
        assert file["steps/loss"][:].tolist() == [99.0] * 3
    with open_run(path) as run:
        assert run.table("steps")["loss"].tolist() == [1.0, 1 / 2, 1 / 3]


def test_a_segment_that_is_a_symbolic_link_is_refused(tmp_path):
    secret = write_run(tmp_path / "secret.h5", steps=3)
    path = make_linking(tmp_path / "run")
    for segment in (tmp_path / "run" / "results.segments").iterdir():
        segment.unlink()
        segment.symlink_to(secret)
    with pytest.raises(ResultsError, match="symbolic link"):
        open_run(path)


def huge(file):
    del file["steps/loss"]
    file.create_dataset("steps/loss", shape=(10**12,), dtype="f8", chunks=(1000,))


def compressed_bomb(file):
    """80 GB in a file of some kB."""
    del file["steps/loss"]
    file.create_dataset("steps/loss", shape=(10**10,), dtype="f8", chunks=(10**5,), compression="gzip")
    file["steps/loss"][: 10**5] = 0


def other_filter(file):
    del file["steps/loss"]
    file.create_dataset("steps/loss", data=np.zeros(10), compression="lzf")


def raw_file_of_the_machine(file):
    del file["steps/loss"]
    file.create_dataset("steps/loss", shape=(10,), dtype="f8", external=[("/etc/passwd", 0, 80)])


def object_references(file):
    del file["steps/loss"]
    file.create_dataset("steps/loss", data=[file["steps"].ref] * 10, dtype=h5py.ref_dtype)


def torn(file):
    del file["steps/loss"]
    file["steps/loss"] = np.zeros(9)


def bomb_in_a_piece(file):
    """80 bytes that unpack to 100 MB."""
    del file["steps/loss"]
    data = file.create_dataset("steps/loss", (10,), "f8", chunks=(10,), compression="gzip")
    data.id.write_direct_chunk((0,), zlib.compress(bytes(10**8)))


def wide_attribute(file):
    file["config"].attrs["a"] = np.zeros(1000)


def external_column(file):
    del file["steps/loss"]
    file["steps/loss"] = h5py.ExternalLink("secret.h5", "steps/loss")


def many_texts(file):
    del file["events/text"]
    file.create_dataset("events/text", data=["x"], dtype=h5py.string_dtype())


@pytest.mark.parametrize(
    "harm",
    [
        huge,
        compressed_bomb,
        other_filter,
        raw_file_of_the_machine,
        object_references,
        torn,
        external_column,
        many_texts,
        bomb_in_a_piece,
        wide_attribute,
    ],
)
def test_a_whole_file_with_a_harmful_dataset_is_refused(tmp_path, harm):
    path = write_run(tmp_path / "results.h5")
    with h5py.File(path, "r+") as file:
        harm(file)
    with open_run(path) as run, pytest.raises(ResultsError, match="not a results file of this package"):
        run.contents()


def test_one_dataset_as_many_columns(tmp_path, monkeypatch):
    """Each by itself is within what the file may unpack to."""
    monkeypatch.setattr(hdf5, "_FREE_BYTES", 2**20)
    path = write_run(tmp_path / "results.h5")
    with h5py.File(path, "r+") as file:
        for name, field in TABLES["steps"].items():
            if field.axes:
                del file["steps"][name]
        file.create_dataset("steps/step_seconds", data=np.zeros((10, 20_000), np.int8), compression="gzip")
    with open_run(path) as run:
        assert run.table("steps", ["step_seconds"])["step_seconds"].shape == (10, 20_000)
        with pytest.raises(ResultsError, match="unpacks to far more"):  # the others say "missing"
            run.table("steps")
    with h5py.File(path, "r+") as file:
        for name, field in TABLES["steps"].items():
            if field.axes and name != "step_seconds":
                file["steps"][name] = file["steps/step_seconds"]
    with open_run(path) as run, pytest.raises(ResultsError, match="unpacks to far more"):
        run.contents()


@pytest.mark.parametrize("ranks", [2**62, -1, 1.5, float("nan")])
def test_files_of_ranks_are_not_counted_on_the_word_of_a_file(tmp_path, ranks):
    path = write_run(tmp_path / "results.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["rank_files"] = ranks
    with pytest.raises(ResultsError, match="rank_files"):
        open_run(path)


def test_a_segment_is_read_once(tmp_path):
    path = make_linking(tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs["segments"] = np.bytes_(b" ".join([file.attrs["segments"].split()[0]] * 1000))
    with pytest.raises(ResultsError, match="twice"):
        open_run(path)


def test_segments_that_grow_when_they_are_joined():
    """Many small values in one, a large one in the other."""
    parts = [
        {"step": np.zeros(shape[0], np.int64), "full_rows": np.zeros(shape, np.int32)}
        for shape in ((10**6, 1), (1, 10**6))
    ]
    with pytest.raises(RefusedError, match="unpacks to far more"):
        columns.join("steps", parts, hdf5.Allowance(10**6))


@pytest.mark.parametrize(
    "yaml",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\n"
        + "".join(f"c{i}: &c{i} [*{'b' if i == 0 else f'c{i - 1}'}, *b]\n" for i in range(2000)),
        "[" * 2_000,
        "- a",
        "a: " + "x" * 10**6,
    ],
)
def test_a_configuration_that_is_none_is_refused(tmp_path, yaml):
    with ResultsWriter(tmp_path / "results.h5") as writer:
        writer.put("config", {"yaml": yaml})
    with open_run(tmp_path) as run, pytest.raises(ResultsError, match="cannot read"):
        _ = run.config


def test_the_configuration_executes_nothing(tmp_path):
    with ResultsWriter(tmp_path / "results.h5") as writer:
        writer.put("config", {"yaml": f"!!python/object/apply:os.mkdir ['{tmp_path}/made']"})
    with open_run(tmp_path) as run, pytest.raises(ResultsError):
        _ = run.config
    assert not (tmp_path / "made").exists()


def test_foreign_files_are_refused(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["steps/loss"] = np.zeros(3)
    (tmp_path / "text.h5").write_text("not HDF5")
    path = write_run(tmp_path / "newer.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = 99
    with pytest.raises(ResultsError, match=r"other\.h5: not a results file"):
        open_run(tmp_path / "other.h5")
    with pytest.raises(ResultsError, match=r"text\.h5: damaged or not an HDF5 file"):
        open_run(tmp_path / "text.h5")
    with pytest.raises(ResultsError, match=r"newer\.h5: its schema version is 99.*update"):
        open_run(path)
    write_run(tmp_path / "runs" / "a" / "results.h5")
    for absent, told in (
        ("absent", "give the path of a run folder"),
        ("runs", rf"{tmp_path}/runs/a is a run folder; give those that you mean, or {tmp_path}/runs/\*/$"),
        ("runs/a/checkpoints", rf"{tmp_path}/runs/a is a run folder; give that$"),
    ):
        with pytest.raises(ResultsError, match=rf"no results file at {tmp_path}/{absent}\S*: {told}"):
            open_run(tmp_path / absent)
    with h5py.File(tmp_path / "packed.h5", "w") as file:
        file.attrs["format"], file.attrs["classes"] = np.bytes_(kinds.IMAGES), [b"cat", b"dog"]
    with pytest.raises(
        ResultsError, match=r"packed\.h5: it is a packed data set \(data\.root\), not the results"
    ):
        open_run(tmp_path / "packed.h5")
    with pytest.raises(PlanError, match=r"packed\.h5: a packed data set \(data\.root\), not a saved plan"):
        SkipPlan.read(tmp_path / "packed.h5")
    with pytest.raises(DataError, match=r"newer\.h5: the results of a run, not a packed data set"):
        open_packed(path, "train")


@pytest.mark.parametrize("locking", [None, True, False])
def test_a_file_that_the_process_has_open_is_read(tmp_path, locking):
    path = write_run(tmp_path / "results.h5")
    with h5py.File(path, "r", locking=locking), open_run(path) as run:
        assert run.complete
        assert len(run.table("steps")["step"]) == 10


READ_DAMAGED = """
import random, sys
from pathlib import Path
from d2ft_hpc.errors import ResultsError
from d2ft_hpc.results import open_run

def survives():
    try:
        with open_run(run) as opened:
            opened.contents()
            opened.config
    except ResultsError:
        return False
    return True

run, files, times = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:-1]], int(sys.argv[-1])
chance = random.Random(1)
assert survives()
for file in files:
    whole = file.read_bytes()
    refused = 0
    for _ in range(times):
        file.write_bytes(whole[: chance.randrange(len(whole))])
        assert not survives(), "truncated"
        start = chance.randrange(len(whole))
        file.write_bytes(whole[:start] + chance.randbytes(8) + whole[start + 8 :])
        refused += not survives()
    assert refused, "no checksum noticed"
    file.write_bytes(whole)
assert survives()
"""


@pytest.mark.parametrize("state", ["killed", "closed"])
def test_damaged_bytes_give_a_clean_error_or_the_data(tmp_path, state):
    """In a process of its own: a crash or an endless loop in the HDF5 library fails the test too."""
    path = tmp_path / "results.h5"
    files = [path]
    if state == "closed":
        write_run(path)
    else:
        make_linking(tmp_path)
        with h5py.File(path) as file:
            files += [
                tmp_path / "results.segments" / name.decode() for name in file.attrs["segments"].split()
            ]
    command = [sys.executable, "-c", READ_DAMAGED, str(path), *map(str, files), "25"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=own_environment())
    assert done.returncode == 0, done.stderr


def test_a_record_goes_on_or_begins_anew_where_it_is_lost_or_never_began(tmp_path):
    path = tmp_path / "results.h5"
    write_run(path)
    with open_run(path) as run:
        steps = len(run.table("steps", ["step"])["step"])
    assert steps > 2
    writer, lost = open_record(path, 1)
    writer.close()
    with open_run(path) as run:
        assert (run.table("steps", ["step"])["step"].tolist(), lost) == ([0, 1], "")
    path.write_bytes(b"damaged")
    writer, lost = open_record(path, 1)
    writer.close()
    assert lost.startswith("the record of the first 2 steps is gone (")
    assert (tmp_path / "results.lost-1" / "results.h5").read_bytes() == b"damaged"
    for last_step in (None, BEFORE_ALL):  # a run that ended before its first step left it
        (tmp_path / "unbegun").mkdir(exist_ok=True)
        ResultsWriter(tmp_path / "unbegun" / "results.h5").close(complete=False)
        writer, lost = open_record(tmp_path / "unbegun" / "results.h5", last_step)
        writer.close(complete=False)
        (tmp_path / "unbegun" / "results.h5").unlink()
        assert lost == ""
