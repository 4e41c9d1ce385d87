import itertools
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from gr.atomic import CheckpointError
from gr.checkpoint import CheckpointManager, read_record
from gr.checkpoint_inspect import inspect
from gr.checkpoint_room import Room
from gr.checkpoint_staging import HostCopy
from gr.checkpoint_state import fingerprint, split_state
from gr.parallel import lost_rank
from tests.dist import run_distributed

ROOT = Path(__file__).parents[2]


def state(seed, rows=5):
    g = torch.Generator().manual_seed(seed)
    return {
        "dense": {
            "layer.0.weight": torch.randn(4, 3, generator=g),
            "bias": torch.randn(2, generator=g).bfloat16(),
        },
        "tables": {
            "item": {"weight": torch.randn(rows, 4, generator=g)},
            "steps": torch.tensor(seed),
        },
        "rng": {"rank_0": torch.randint(0, 256, (9,), generator=g, dtype=torch.uint8)},
        "progress": {
            "step": seed,
            "lr": 0.1 + seed,
            "name": "a",
            "rows": [1, 2, seed],
            "none": None,
        },
    }


def assert_same(a, b):
    (tensors_a, values_a), (tensors_b, values_b) = split_state(a), split_state(b)
    assert values_a == values_b
    assert tensors_a.keys() == tensors_b.keys()
    for key in tensors_a:
        torch.testing.assert_close(tensors_a[key], tensors_b[key], rtol=0, atol=0)


@pytest.fixture
def manager(tmp_path):
    return CheckpointManager(tmp_path / "checkpoints", keep=2)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    manager = CheckpointManager(tmp_path / "checkpoints", keep=2, asynchronous=True)
    for step in (1, 2, 3):
        live = state(step)
        manager.save(step, live)
        for tensor in split_state(live)[0].values():
            tensor.fill_(7)  # the next update
    manager.wait()
    assert manager.steps() == [2, 3]
    for step in (2, 3):
        loaded = state(0)
        manager.load(step, loaded)
        assert_same(loaded, state(step))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_part_may_be_a_function(tmp_path, monkeypatch, asynchronous):
    manager = CheckpointManager(tmp_path / "checkpoints", asynchronous=asynchronous)
    calls = []
    copy_from_gpu = HostCopy.copy_from_gpu

    def copy(host, tensors):
        calls.append("copy")
        return copy_from_gpu(host, tensors)

    monkeypatch.setattr(HostCopy, "copy_from_gpu", copy)

    def part(name, seed):
        def call():
            calls.append(name)
            return state(seed)[name]

        return call

    def fail():
        raise FloatingPointError("not finite")

    late = {name: part(name, 1) for name in ("progress", "rng")}
    manager.save(1, state(1) | late)
    manager.wait()
    # A GPU is asked for its tensors first; then the order of the state, on every rank.
    assert calls == ["copy"] * asynchronous + ["rng", "progress"]
    loaded = state(0) | {"rng": lambda: stored["rng"]}
    stored = state(0)
    manager.load(1, loaded)
    assert_same(loaded | {"rng": stored["rng"]}, state(1))

    # One that fails leaves no checkpoint.
    for bad, error, message in (
        ({"progress": fail}, FloatingPointError, "not finite"),
        (
            {"progress": lambda: {"step": 1}, "progress.step": 2},
            ValueError,
            r"two parts of the state have the key 'progress\.step'",
        ),
        (
            {"progress": lambda: {"x": torch.zeros(1)}, "progress.x": 2},
            ValueError,
            r"two parts of the state have the key 'progress\.x'",
        ),
        (
            {"progress": lambda: {"x": [torch.zeros(1)]}},
            ValueError,
            r"state 'progress\.x': expected a tensor",
        ),
        (
            {"progress": lambda: {"x": lambda: 1}},
            ValueError,
            r"state 'progress\.x': expected a tensor",
        ),
        ({"progress": dict}, ValueError, "state 'progress': expected a tensor"),
    ):
        with pytest.raises(error, match=message):
            manager.save(2, state(2) | bad)
    manager.wait()
    assert [path.name for path in manager.folder.iterdir()] == ["step_1"]
    manager.save(2, state(2))
    manager.close()
    assert manager.steps() == [1, 2]


def _load_beside_saves(folder: str) -> None:
    manager = CheckpointManager(Path(folder), keep=9, asynchronous=True)
    for step in range(1, 6):
        manager.save(step, state(step))
        time.sleep(0.003 * step * dist.get_rank())
        if step > 1:
            loaded = state(0)
            manager.load(step - 1, loaded)
            assert_same(loaded, state(step - 1))
    manager.wait()
    manager.close()
    assert manager.steps() == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_ranks_load_one_checkpoint_while_another_is_written(tmp_path):
    run_distributed(_load_beside_saves, 2, str(tmp_path), timeout_s=60)


def _save_alone(folder: str) -> str:
    """Rank 1 comes ten seconds late, where a twentieth of a minute is allowed."""
    manager = CheckpointManager(Path(folder), timeout_minutes=0.05)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError) as caught:
            manager.save(1, state(1))
        return str(caught.value)
    manager._form_groups()  # and no more
    time.sleep(10)
    return ""


@pytest.mark.slow
def test_a_save_waits_for_another_rank_no_longer_than_it_may(tmp_path):
    message, _ = run_distributed(_save_alone, 2, str(tmp_path), timeout_s=60)
    assert "imed out" in message
    assert lost_rank(RuntimeError(message))


def _fill_the_disk(folder: str, asynchronous: bool) -> list[str]:
    """Save step 1; then step 2, for which the last rank may write no file above 1 kB; then 3."""
    manager = CheckpointManager(Path(folder), keep=2, asynchronous=asynchronous)
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    seen = []
    for step in (1, 2, 3):
        limit = 1000 if step == 2 and last else resource.RLIM_INFINITY
        writer = manager._process.pid if asynchronous else 0
        resource.prlimit(writer, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        histories = Path(folder, f"histories_{step}")
        histories.mkdir(exist_ok=True)
        own = {"table": {f"of_{'last' if last else 'other'}": torch.full((5000,), float(step))}}
        try:
            manager.save(step, own, [histories])
            manager.wait()
            seen.append("saved")
        except CheckpointError as error:
            seen.append(str(error))
            assert not histories.exists()
    manager.close()
    assert manager.steps() == [1, 3]
    assert not list(Path(folder).glob("*.tmp"))
    assert manager.read(1, "table")["of_last"].unique().tolist() == [1.0]
    assert manager.read(3, "table")["of_last"].unique().tolist() == [3.0]
    return seen


@pytest.mark.parametrize(
    ("world_size", "asynchronous"),
    [
        (1, True),
        (2, False),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, world_size, asynchronous):
    for seen in run_distributed(_fill_the_disk, world_size, str(tmp_path), asynchronous):
        assert seen[0] == seen[2] == "saved"
        assert "checkpoint of step 2 could not be written" in seen[1]
        assert f"rank {world_size - 1}" in seen[1]
        assert "File too large" in seen[1]
        assert "the newest is of step 1" in seen[1]


@pytest.mark.slow
def test_a_killed_writer_costs_the_checkpoint_that_it_wrote(tmp_path):
    manager = CheckpointManager(tmp_path / "checkpoints", keep=2, asynchronous=True)
    manager.reserve(state(0))
    manager.save(1, state(1))
    manager.wait()
    first = manager._process.pid
    os.kill(first, signal.SIGSTOP)
    manager.save(2, state(2))
    os.kill(first, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="process that writes checkpoints ended with status"):
        manager.wait()
    assert manager.steps() == [1]
    manager.save(3, state(3))
    manager.wait()
    assert manager._process.pid != first
    loaded = state(0)
    manager.load(3, loaded)
    assert_same(loaded, state(3))
    manager.close()
    assert not Path(f"/proc/{manager._process.pid}").exists()


@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.lists(st.integers(0, 5), max_size=3),
                st.sampled_from([torch.float32, torch.int64, torch.bool, torch.float16]),
                st.booleans(),
            ),
            max_size=4,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_copies_on_the_host_are_whole_and_in_one_place(saves):
    """Shapes change from save to save; strided tensors become contiguous."""
    host = HostCopy()
    for number, save in enumerate(saves):
        tensors = {}
        for i, (shape, dtype, is_strided) in enumerate(save):
            full = torch.randint(0, 2, [*shape, 2 if is_strided else 1]).to(dtype) * (number + 1)
            tensors[str(i)] = full[..., 0]
        copies = host.copy_from_host(tensors)
        host.wait()
        places = [Room.find(copies[key]) for key in tensors]
        for place, (key, tensor) in zip(places, tensors.items(), strict=True):
            assert torch.equal(copies[key], tensor)
            assert copies[key].dtype == tensor.dtype
            assert place.dtype == tensor.dtype
        ends = sorted(
            (place.offset, place.offset + tensor.numel() * tensor.element_size())
            for place, tensor in zip(places, tensors.values(), strict=True)
            if tensor.numel()
        )
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))


@pytest.mark.gpu
def test_what_a_gpu_does_after_a_copy_is_not_in_it():
    host = HostCopy()
    x = torch.arange(1 << 24, device="cuda")
    for number in range(3):
        copies = host.copy_from_gpu({"x": x})
        x += 1  # the host has not waited
        host.wait()
        assert torch.equal(copies["x"], torch.arange(1 << 24) + number)


@pytest.mark.gpu
def test_a_save_asks_a_busy_gpu_for_copies_before_it_waits_for_it(tmp_path):
    manager = CheckpointManager(tmp_path / "checkpoints", asynchronous=True)
    x = torch.arange(1 << 24, device="cuda")
    seen = []

    def progress():
        seen.append(done.query())
        x.add_(1)  # too late
        return {"step": 1}

    manager.reserve({"x": x, "progress": progress})
    assert seen == []
    x += 1  # a kernel's first launch loads it, for which the GPU must be idle
    HostCopy().copy_from_gpu({"x": x})
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # a second
    x += 1
    done = torch.cuda.Event()
    done.record()
    manager.save(1, {"x": x, "progress": progress})
    manager.wait()
    with pytest.raises(ValueError, match=r"expected 'progress\.x', which a function returned, on"):
        manager.save(2, {"progress": lambda: {"x": x}})
    manager.close()
    assert seen == [False]
    loaded = {"x": torch.zeros_like(x), "progress": {"step": 0}}
    manager.load(1, loaded)
    assert torch.equal(loaded["x"].cpu(), torch.arange(1 << 24) + 2)


def test_load_gives_what_was_saved_in_place(manager):
    manager.save(7, state(7))
    other = state(1)
    weight = other["dense"]["layer.0.weight"]
    manager.load(7, other)
    assert_same(other, state(7))
    assert weight is other["dense"]["layer.0.weight"]


@settings(deadline=None, max_examples=12)
@given(
    st.dictionaries(
        st.text("ab.", min_size=1, max_size=3),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**70), 2**70)
            | st.floats(allow_nan=False)
            | st.text(max_size=4),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=5,
        ),
        max_size=4,
    )
)
def test_plain_values_come_back_exactly(tmp_path_factory, values):
    manager = CheckpointManager(tmp_path_factory.mktemp("c"))
    saved = {"x": torch.zeros(1), "values": values}
    manager.save(1, saved)
    found = {"x": torch.ones(1), "values": dict.fromkeys(values)}
    manager.load(1, found)
    assert_same(found, saved)


def test_optimizer_goes_on_as_if_nothing_had_happened(manager):
    def build():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        model(
            torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        ).square().sum().backward()
        optimizer.step()

    def whole(model, optimizer):
        return {
            "model": model.state_dict(),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }

    model, optimizer = build()
    step(model, optimizer, 1)
    manager.save(1, whole(model, optimizer))
    step(model, optimizer, 2)
    resumed, resumed_optimizer = build()
    step(resumed, resumed_optimizer, 99)  # state that the load must replace
    restored = whole(resumed, resumed_optimizer)
    manager.load(1, restored)
    step(resumed, resumed_optimizer, 2)
    assert_same(whole(resumed, resumed_optimizer), whole(model, optimizer))


def test_values_need_no_template(manager):
    manager.save(3, state(3) | {"position": {"rows": {"a": 1, "b": [2]}}})
    other = state(1) | {"position": None}
    manager.load(3, other)
    assert other["position"] == {"rows": {"a": 1, "b": [2]}}


def test_the_newest_are_kept(manager):
    assert manager.latest() is None
    for step in (5, 10, 9, 100):
        manager.save(step, state(step))
    assert manager.steps() == [10, 100]
    assert manager.latest() == 100
    assert sorted(p.name for p in manager.folder.iterdir()) == ["step_10", "step_100"]


def test_a_step_is_saved_once(manager):
    manager.save(1, state(1))
    with pytest.raises(ValueError, match="there already"):
        manager.save(1, state(2))
    other = state(3)
    manager.load(1, other)
    assert_same(other, state(1))


# Forks for each moment, so that torch is imported once.
KILLED = """
import os, sys, torch
from pathlib import Path
from gr import checkpoint
moments = {
    "tensors": (checkpoint, "dcp_save"),
    "record": (checkpoint, "write_atomically"),
    "rename": (Path, "rename"),
    "prune": (checkpoint.shutil, "rmtree"),
}
for moment, (owner, name) in moments.items():
    if os.fork() == 0:
        manager = checkpoint.CheckpointManager(Path(sys.argv[1], moment), keep=1)
        manager.save(1, {"x": torch.full((3,), 1.0)})
        setattr(owner, name, lambda *args, **kwargs: os._exit(9))
        manager.save(2, {"x": torch.full((3,), 2.0)})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
"""


def test_a_kill_leaves_the_old_checkpoint_or_the_new(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=True)
    for moment, left in (("tensors", 1), ("record", 1), ("rename", 1), ("prune", 2)):
        manager = CheckpointManager(tmp_path / moment, keep=1)
        assert manager.steps() == [left], moment
        found = {"x": torch.zeros(3)}
        manager.load(left, found)
        assert found["x"].tolist() == [left] * 3
        # The next save sweeps up what the kill left behind.
        manager.save(3, found)
        assert [p.name for p in manager.folder.iterdir()] == ["step_3"], moment


def test_another_model_is_refused_by_its_first_differences(manager):
    manager.save(1, state(1))
    other = state(2, rows=6)
    other["dense"]["new"] = torch.zeros(1)
    del other["dense"]["bias"]
    other["tables"]["steps"] = torch.tensor(1.0)
    before = {key: tensor.clone() for key, tensor in split_state(other)[0].items()}
    with pytest.raises(ValueError, match="a checkpoint of another model") as caught:
        manager.load(1, other)
    message = str(caught.value)
    assert "only this run has dense.new" in message
    assert "only the checkpoint has dense.bias" in message
    assert "tables.item.weight is (5, 4) float32 in the checkpoint, (6, 4) float32" in message
    assert "tables.steps is () int64 in the checkpoint, () float32" in message
    assert fingerprint(read_record(manager.path(1))["tensors"]) in message
    for key, tensor in split_state(other)[0].items():
        assert torch.equal(tensor, before[key])


def test_a_value_that_the_checkpoint_lacks_is_named(manager):
    manager.save(1, state(1))
    other = state(2)
    other["progress"]["epoch"] = 3
    with pytest.raises(ValueError, match=r"lacks the value\(s\) \['progress\.epoch'\]"):
        manager.load(1, other)


def test_parts_apart_are_read_on_their_own(tmp_path):
    manager = CheckpointManager(tmp_path, apart=("rng", "metrics"))
    saved = state(1) | {"metrics": {"rank_0": {"open/click": torch.arange(5), "window": 3}}}
    manager.save(1, saved)
    other = state(2)
    other["rng"] = {"rank_7": torch.zeros(2, dtype=torch.uint8)}
    manager.load(1, other)
    assert other["rng"]["rank_7"].tolist() == [0, 0]
    assert "metrics" not in other
    assert_same({"progress": other["progress"]}, {"progress": saved["progress"]})
    part = manager.read(1, "metrics.rank_0")
    assert part.keys() == {"open/click", "window"}
    assert part["window"] == 3
    assert torch.equal(part["open/click"], torch.arange(5))
    assert manager.read(1, "metrics.rank_1") == {}
    # Metrics grow; the model's fingerprint does not change with them.
    saved["metrics"]["rank_0"]["open/click"] = torch.arange(50)
    manager.save(2, saved)
    assert (
        read_record(manager.path(1))["fingerprint"] == read_record(manager.path(2))["fingerprint"]
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": object()}, "state 'a': expected a tensor"),
        ({"a": [torch.zeros(1)]}, "Tensors go into dicts"),
        ({"a": {"b": 1}, "a.b": 2}, "two parts of the state have the key 'a.b'"),
    ],
)
def test_a_state_that_cannot_be_saved(manager, bad, message):
    with pytest.raises(ValueError, match=message):
        manager.save(1, bad)
    assert manager.steps() == []


def test_wrong_paths_and_formats(manager, tmp_path):
    with pytest.raises(ValueError, match=r"step_4 is no complete checkpoint"):
        manager.load(4, state(1))
    path = manager.save(1, state(1))
    record = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(ValueError, match="expected format 1, found 2"):
        manager.load(1, state(1))
    (path / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        manager.load(1, state(1))
    with pytest.raises(ValueError, match="found none"):
        inspect(tmp_path / "absent")
    with pytest.raises(ValueError, match="keep must be at least 1"):
        CheckpointManager(tmp_path, keep=0)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_a_hostile_index_runs_no_code(manager, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = manager.save(1, state(1))
    (path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match=r"names posix\.mkdir"):
        manager.load(1, state(1))
    (path / ".metadata").write_bytes(b"\x80\x05half")
    with pytest.raises(ValueError, match="is damaged"):
        manager.load(1, state(1))
    assert not (tmp_path / "attacked").exists()


def test_inspect_counts_bytes_and_finds_the_newest(manager):
    manager.save(1, state(1))
    manager.save(2, state(2))
    text = inspect(manager.folder.parent)
    assert text == inspect(manager.folder) == inspect(manager.path(2))
    tensors = split_state(state(2))[0]
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert "step 2, saved by 1 rank(s)" in text
    assert f"{len(tensors)} tensors, {total:,} bytes" in text
    assert "tables.item.weight" in text
    assert "progress.rows = [1, 2, 2]" in text


def sharded(full, mesh):
    return {"w": distribute_tensor(full, mesh, [Shard(0)])}


def save_on_ranks(folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    manager = CheckpointManager(Path(folder), apart=("rng",))
    saved = sharded(torch.arange(14.0).view(7, 2), mesh) | {
        "same": torch.tensor([5.0]),
        "rng": {f"rank_{rank}": torch.tensor([rank])},
        "values": {f"rank_{rank}": rank, "step": 4},
    }
    manager.save(4, saved)
    steps = manager.steps()
    try:
        manager.save(5, {"value": rank})
    except ValueError as error:
        return steps, str(error), manager.steps()
    return steps, "", manager.steps()


def load_on_ranks(folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    manager = CheckpointManager(Path(folder), apart=("rng",))
    found = sharded(torch.zeros(7, 2), mesh) | {"same": torch.zeros(1), "values": {}}
    manager.load(4, found)
    own = manager.read(4, f"rng.rank_{dist.get_rank()}")
    return found["w"].full_tensor().tolist(), found["same"].tolist(), found["values"], len(own)


def test_ranks_save_together_and_any_number_loads(tmp_path):
    folder = str(tmp_path / "c")
    for steps, message, after in run_distributed(save_on_ranks, 2, folder):
        assert steps == after == [4]
        assert "state 'value' differs between ranks: 0 on one, 1 on rank 1" in message
    expected = (
        torch.arange(14.0).view(7, 2).tolist(),
        [5.0],
        {"rank_0": 0, "rank_1": 1, "step": 4},
    )
    assert [r[:3] for r in run_distributed(load_on_ranks, 2, folder)] == [expected] * 2
    # One process, no group: the shards are put together.
    manager = CheckpointManager(tmp_path / "c", apart=("rng",))
    assert manager.num_ranks(4) == 2
    alone = {"w": torch.zeros(7, 2), "same": torch.zeros(1), "values": {}}
    manager.load(4, alone)
    assert (alone["w"].tolist(), alone["same"].tolist(), alone["values"]) == expected
    assert [manager.read(4, "rng")[f"rank_{r}"].item() for r in (0, 1)] == [0, 1]


def test_infinite_values_survive(manager):
    manager.save(1, {"best": math.inf, "x": torch.zeros(1)})
    found = {"best": 0.0, "x": torch.zeros(1)}
    manager.load(1, found)
    assert found["best"] == math.inf


def test_a_removed_part_is_no_checkpoint(manager):
    path = manager.save(1, state(1))
    shutil.move(path / "checkpoint.json", path / "other.json")
    assert manager.steps() == []
    with pytest.raises(ValueError, match="no complete checkpoint"):
        inspect(manager.folder)
