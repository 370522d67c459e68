"""SkipPlan: a value that is checked, hashed, packed, saved and compared."""

import copy
import dataclasses
import hashlib
import json
import math
import struct

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning import Operation, SkipPlan


@st.composite
def plans(draw):
    slots, replicas, blocks, heads = (draw(st.integers(1, 5)) for _ in range(4))
    seed = draw(st.integers(0, 2**32 - 1))
    operations = np.random.default_rng(seed).integers(0, 3, (slots * replicas, blocks, heads), dtype=np.uint8)
    objective, slack, seconds = (draw(st.floats(0, 1e300)) for _ in range(3))
    bound = draw(st.sampled_from([objective + slack, math.nan]))
    return SkipPlan(
        operations,
        replicas,
        planner=draw(st.sampled_from(["joint", "paper", "é"])),
        objective=objective,
        bound=bound,
        gap=(bound - objective) / bound if bound != 0 else 0.0,
        status=draw(st.sampled_from(["", "optimal", "greedy: time limit (rank 1)"])),
        solve_seconds=seconds,
    )


@pytest.fixture
def plan():
    operations = np.random.default_rng(0).integers(0, 3, (6, 3, 5), dtype=np.uint8)
    return SkipPlan(operations, 2, planner="joint", objective=1.5, bound=2.0, gap=0.25, status="optimal")


CONTRADICTIONS = [
    {"gap": 0.0},
    {"gap": -0.25},
    {"gap": 0.3},
    {"gap": math.inf},
    {"bound": 1.0},
    {"bound": math.inf},
    {"objective": 3.0},
    {"objective": -math.inf},
    {"solve_seconds": -1.0},
    {"solve_seconds": math.nan},
]


def evidence(plan):
    """As text, since NaN is not equal to itself."""
    return {f.name: repr(getattr(plan, f.name)) for f in dataclasses.fields(plan) if f.name != "operations"}


def sealed(body):
    """A message whose checksum is right, as someone who means harm would send it."""
    return body + hashlib.sha256(body).digest()


def message_with(header, packed=b"\0", version=1):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return sealed(struct.pack("<8sHI", b"D2FTPLAN", version, len(text)) + text + packed)


def header_of(plan):
    message = plan.to_bytes()
    length = struct.unpack_from("<8sHI", message)[2]
    return json.loads(message[14 : 14 + length]), message[14 + length : -32]


@given(plans())
def test_bytes_bring_back_the_plan_and_its_evidence(plan):
    back = SkipPlan.from_bytes(plan.to_bytes())
    np.testing.assert_array_equal(back.operations, plan.operations)
    assert evidence(back) == evidence(plan)
    assert back == plan


@given(plans(), st.data())
def test_any_changed_or_missing_byte_is_noticed(plan, data):
    message = plan.to_bytes()
    position = data.draw(st.integers(0, len(message) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = message[:position] + bytes([message[position] ^ flip]) + message[position + 1 :]
    for damaged in (changed, message[:position], message + b"\0"):
        with pytest.raises(PlanError):
            SkipPlan.from_bytes(damaged)


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(noise):
    for message in (noise, b"D2FTPLAN" + noise, sealed(struct.pack("<8sHI", b"D2FTPLAN", 1, 5) + noise)):
        with pytest.raises(PlanError):
            SkipPlan.from_bytes(message)


def test_well_sealed_but_hostile_messages_are_refused(plan):
    header, packed = header_of(plan)
    SkipPlan.from_bytes(message_with(header, packed))  # the forge works
    hostile = [
        message_with(b"[" * 100_000),
        message_with(b"\xff\xfe"),
        message_with([]),
        message_with({}),
        message_with(header | {"more": 1}, packed),
        message_with(header, packed, version=2),
        message_with(header | {"shape": [2**40, 2**20, 2**20]}, packed),
        message_with(header | {"shape": [-6, -3, 5]}, packed),
        message_with(header | {"shape": [6, 3, 5.0]}, packed),
        message_with(header | {"shape": [6, 15]}, packed),
        message_with(header | {"shape": "abc"}, packed),
        message_with(header | {"shape": [6, 3, True]}, packed),
        message_with(header | {"replicas": 3}, packed),
        message_with(header | {"replicas": 0}, packed),
        message_with(header | {"replicas": 2.0}, packed),
        message_with(header | {"planner": None}, packed),
        message_with(header | {"status": "two\nlines"}, packed),
        message_with(header | {"status": "\ud800"}, packed),
        message_with(header | {"objective": "1"}, packed),
        *(message_with(header | contradiction, packed) for contradiction in CONTRADICTIONS),
        message_with(header | {"hash": "0" * 64}, packed),
        message_with(header, b"\xff" * len(packed)),
        message_with(header, packed[:-1] + bytes([packed[-1] | 0xC0])),
    ]
    for message in hostile:
        with pytest.raises(PlanError):
            SkipPlan.from_bytes(message)


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_evidence_that_contradicts_itself_is_refused(tmp_path, plan, contradiction):
    """In a file whose digest was made to fit it, too."""
    with pytest.raises(PlanError):
        dataclasses.replace(plan, **contradiction)
    plan.write(tmp_path / "plan.h5")
    with h5py.File(tmp_path / "plan.h5", "r+") as file:
        for name, value in contradiction.items():
            file.attrs[name] = value
    with pytest.raises(PlanError, match=r"plan\.h5 is damaged"):
        SkipPlan.read(tmp_path / "plan.h5")


def test_two_bits_an_entry():
    large = SkipPlan.dense(32, 1, 80, 64)
    assert len(large.to_bytes()) < 32 * 80 * 64 / 4 + 500


@settings(max_examples=20, deadline=None)
@given(plans())
def test_a_saved_plan_comes_back(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("plans") / "plan.h5"
    plan.write(path)
    back = SkipPlan.read(path)
    assert back == plan
    assert evidence(back) == evidence(plan)
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.h5"]


def test_unknown_evidence_survives_packing_and_saving(tmp_path):
    plan = SkipPlan(np.zeros((1, 1, 1), dtype=np.uint8), 1)
    plan.write(tmp_path / "plan.h5")
    for back in (SkipPlan.from_bytes(plan.to_bytes()), SkipPlan.read(tmp_path / "plan.h5")):
        assert math.isnan(back.bound)


def test_plain_h5py_reads_a_saved_plan(tmp_path, plan):
    plan.write(tmp_path / "plan.h5")
    with h5py.File(tmp_path / "plan.h5") as file:
        np.testing.assert_array_equal(file["operations"][()], plan.operations)
        assert file.attrs["planner"].decode() == "joint"
        assert file.attrs["hash"].decode() == plan.hash


def test_saving_replaces_an_older_plan_and_failing_to_save_leaves_it(tmp_path, plan):
    path = tmp_path / "plan.h5"
    SkipPlan.dense(1, 1, 1, 1).write(path)
    plan.write(path)
    assert SkipPlan.read(path) == plan
    with pytest.raises(PlanError, match="missing"):
        plan.write(tmp_path / "missing" / "plan.h5")
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(PlanError, match=r"folder\.h5"):
        plan.write(tmp_path / "folder.h5")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder.h5", "plan.h5"]


def change_operations(file):
    file["operations"][0, 0, 0] = (file["operations"][0, 0, 0] + 1) % 3


def replace_operations(**arguments):
    def damage(file):
        del file["operations"]
        file.create_dataset("operations", **arguments)

    return damage


def link_outside(file):
    del file["operations"]
    file["operations"] = h5py.ExternalLink("/etc/hostname", "operations")


@pytest.mark.parametrize(
    "damage",
    [
        change_operations,
        link_outside,
        lambda file: file.__delitem__("operations"),
        lambda file: file.attrs.__delitem__("hash"),
        lambda file: file.attrs.__setitem__("format", "other"),
        lambda file: file.attrs.__setitem__("format", [1, 2]),
        lambda file: file.attrs.__setitem__("version", 3),
        lambda file: file.attrs.__setitem__("version", "2"),
        lambda file: file.attrs.__setitem__("planner", "of variable length"),
        lambda file: file.attrs.__setitem__("planner", np.bytes_(b"better")),
        lambda file: file.attrs.__setitem__("status", np.bytes_(b"\xff")),
        lambda file: file.attrs.__setitem__("solve_seconds", 0.5),
        lambda file: file.attrs.__setitem__("digest", np.bytes_(b"0" * 64)),
        lambda file: file.attrs.__setitem__("replicas", 3),
        lambda file: file.attrs.__setitem__("objective", "good"),
        replace_operations(data=np.full((6, 3, 5), 7, np.uint8)),
        replace_operations(data=np.zeros((6, 3, 5))),
        replace_operations(data=np.zeros((6, 15), np.uint8)),
        replace_operations(shape=(2**20, 2**10, 2**10), dtype=np.uint8, chunks=(1, 1024, 1024)),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, plan, damage):
    path = tmp_path / "plan.h5"
    plan.write(path)
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(PlanError, match=r"plan\.h5"):
        SkipPlan.read(path)


def test_files_that_are_no_plans_are_refused(tmp_path, plan):
    (tmp_path / "text.h5").write_text("not HDF5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["operations"] = plan.operations
    plan.write(tmp_path / "short.h5")
    whole = (tmp_path / "short.h5").read_bytes()
    (tmp_path / "short.h5").write_bytes(whole[: len(whole) // 2])
    for name in ("text.h5", "foreign.h5", "short.h5", "absent.h5"):
        with pytest.raises(PlanError, match=name):
            SkipPlan.read(tmp_path / name)


def test_the_hash_covers_shape_replicas_and_operations_only(plan):
    assert dataclasses.replace(plan, planner="paper", objective=0.0, gap=1.0, status="other") == plan
    others = [
        SkipPlan(plan.operations, 3),
        SkipPlan(plan.operations.reshape(6, 5, 3), 2),
        SkipPlan((plan.operations + 1) % 3, 2),
    ]
    assert len({plan, copy.copy(plan), *others}) == 4
    assert plan != "plan"
    assert SkipPlan.dense(1, 1, 1, 1).hash == (
        hashlib.sha256(struct.pack("<4q", 1, 1, 1, 1) + b"\x02").hexdigest()
    )


def test_nothing_changes_a_plan(plan):
    given_operations = np.zeros((2, 1, 1), dtype=np.uint8)
    made = SkipPlan(given_operations, 1)
    given_operations[:] = 2
    assert made.operations.max() == 0
    with pytest.raises(ValueError, match="read-only"):
        plan.operations[0, 0, 0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        plan.operations.setflags(write=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.replicas = 1


@pytest.mark.parametrize(
    ("operations", "replicas", "message"),
    [
        (np.zeros((2, 3), np.uint8), 1, r"\(2, 3\)"),
        (np.zeros((0, 3, 3), np.uint8), 1, r"\(0, 3, 3\)"),
        (np.zeros((2, 3, 4)), 1, "float64"),
        (np.array([[[0, 3]]]), 1, "3 at row 0, block 0, head 1"),
        (np.array([[[-1]]]), 1, "-1 at row 0"),
        (np.array([[[258]]]), 1, "258 at row 0"),
        (np.zeros((3, 1, 1), np.uint8), 2, "3 rows .* 2 replicas"),
        (np.zeros((3, 1, 1), np.uint8), 0, "0 replicas"),
        (np.zeros((3, 1, 1), np.uint8), 1.0, r"integer, got 1\.0"),
        (np.zeros((3, 1, 1), np.uint8), True, "integer, got True"),
    ],
)
def test_what_is_no_plan_is_refused(operations, replicas, message):
    with pytest.raises(PlanError, match=message):
        SkipPlan(operations, replicas)


def test_rows_are_slots_times_replicas(plan):
    assert (plan.num_rows, plan.slots, plan.num_blocks, plan.num_heads) == (6, 3, 3, 5)
    for replica in range(2):
        own = plan.for_replica(replica)
        for slot in range(3):
            np.testing.assert_array_equal(own[slot], plan.operations[slot * 2 + replica])
    for replica in (-1, 2):
        with pytest.raises(PlanError, match="0 to 1"):
            plan.for_replica(replica)


def test_dense_shares_and_differences(plan):
    dense = SkipPlan.dense(3, 2, 3, 5)
    assert dense.is_dense
    assert not plan.is_dense
    assert dense.shares() == {Operation.SHORTCUT: 0, Operation.FORWARD_ONLY: 0, Operation.FULL: 1}
    assert sum(plan.shares().values()) == pytest.approx(1)
    assert plan.differs_from(plan) == {}
    changes = plan.differs_from(dense)
    assert changes == {
        (Operation.SHORTCUT, Operation.FULL): int((plan.operations == 0).sum()),
        (Operation.FORWARD_ONLY, Operation.FULL): int((plan.operations == 1).sum()),
    }
    with pytest.raises(PlanError, match="different shapes"):
        plan.differs_from(SkipPlan.dense(6, 1, 3, 5))
    with pytest.raises(PlanError, match="at least one"):
        SkipPlan.dense(3, 0, 3, 5)
