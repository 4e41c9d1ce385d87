import os
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gr import parallel
from gr.parallel import World
from tests.dist import run_distributed

CPU = torch.device("cpu")


def message(action):
    try:
        action()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def agree(values):
    world = parallel.start("cpu")
    return message(lambda: world.agree("configuration", values[world.rank]))


def test_ranks_that_agree_go_on_and_others_hear_where_they_differ():
    same = "a: 1\nb: 2\n"
    assert run_distributed(agree, 2, [same, same]) == [None, None]
    texts = run_distributed(agree, 2, [same, "a: 1\nb: 3\n"])
    assert texts[0] == texts[1]
    assert "the same configuration, but rank 1 differs from rank 0" in texts[0]
    assert "'b: 2' against 'b: 3'" in texts[0]
    texts = run_distributed(agree, 2, [same, same + "c: 4\n"])
    assert "2 against 3 lines" in texts[0]


def lose_a_rank(how):
    group = dist.new_group(timeout=timedelta(seconds=0.3))
    dist.barrier()
    if dist.get_rank() == 1:
        if how == "dies":
            dist.destroy_process_group()
        else:
            time.sleep(1)
        return None
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        return parallel.lost_rank(error)
    return "no error"


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_is_lost(how):
    text = run_distributed(lose_a_rank, 2, how)[0]
    assert text.startswith("lost contact with another rank: ")
    assert ("Timed out" if how == "hangs" else "Connection") in text


def test_other_errors_are_not_a_lost_rank():
    for error in (RuntimeError("CUDA out of memory"), RuntimeError(""), KeyError("gloo")):
        assert parallel.lost_rank(error) is None


def test_ranks_that_do_not_come(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for key, value in {**environment, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(key, value)
    expected = rf"rank 0 waited 0\.01 min at 127\.0\.0\.1:{port} for 3 ranks, but not all came"
    with pytest.raises(ValueError, match=expected):
        parallel.start("cpu", timeout_minutes=0.01)


def test_the_job_that_the_launcher_names(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert parallel.environment_job() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert parallel.environment_job() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "17")
    assert parallel.environment_job() == "17"


def end_many_times(folder):
    rank = dist.get_rank()
    dist.destroy_process_group()
    for i in range(10):
        where = f"file://{folder}/{i}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
        model = DistributedDataParallel(torch.nn.Linear(4, 4))
        # What is sent last is still held by a thread of the group when the main thread goes on.
        dist.broadcast_object_list([None])
        parallel.stop(World(rank, 2, CPU, owns_group=True))
        del model
    return True


def test_a_run_ends_while_its_model_still_holds_the_group(tmp_path):
    assert run_distributed(end_many_times, 2, str(tmp_path), timeout_s=60) == [True, True]


def sums_and_actions(folder):
    world = parallel.start("cpu")
    mine = torch.tensor([1.0, world.rank])
    total = world.sum(mine)
    assert mine.tolist() == [1.0, world.rank]  # the argument stays as it was

    def write():
        with open(os.path.join(folder, "written"), "a") as file:
            file.write(f"{world.rank}")

    def fail():
        raise ValueError(f"wrong on {world.rank}")

    world.on_main(write)
    # Whoever comes after on_main finds what it wrote.
    with open(os.path.join(folder, "written")) as file:
        found = file.read()
    absent = os.path.join(folder, "absent", "file")
    texts = [message(lambda f=f: world.on_main(f)) for f in (fail, lambda: os.stat(absent))]
    return world, total.tolist(), found, texts, world.is_main


def test_sums_over_ranks_and_actions_of_one(tmp_path):
    results = run_distributed(sums_and_actions, 2, str(tmp_path))
    for rank, (world, total, found, texts, is_main) in enumerate(results):
        assert world == World(rank, 2, CPU)
        assert total == [2.0, 1.0]
        assert found == "0"
        assert texts[0] == "ValueError: wrong on 0"
        assert texts[1].startswith("FileNotFoundError")
        assert is_main == (rank == 0)


def test_one_rank_needs_no_group():
    world = World(0, 1, CPU)
    x = torch.arange(3)
    assert torch.equal(world.sum(x), x)
    world.agree("anything", "value")
    done = []
    world.on_main(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        world.on_main(lambda: 1 / 0)


def test_a_lonely_process_on_the_cpu_starts_without_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert parallel.environment_rank() == 0
    assert parallel.start("cpu") == World(0, 1, CPU)
    assert not torch.distributed.is_initialized()


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device=cuda, but torch sees no GPU here"):
        parallel.start("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"local rank 1 has no GPU of its own: this host has 1"):
        parallel.start("cuda")


def test_determinism_is_set_and_cleared(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "kept")
    was = torch.are_deterministic_algorithms_enabled()
    try:
        for wanted in (True, False):
            parallel.set_determinism(wanted)
            assert torch.are_deterministic_algorithms_enabled() == wanted
            assert torch.backends.cudnn.benchmark != wanted
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "kept"
    finally:
        torch.use_deterministic_algorithms(was)
