import os

import pytest
import torch

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
