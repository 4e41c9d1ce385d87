import json
from random import Random

import pytest
import torch

from tests.e2e.mission import carry_out
from tests.e2e.supervised import supervised


def write(folder, job, restart, rank, rows, *, cut=""):
    path = folder / str(job) / str(restart) / f"{rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "events": events}) + "\n" for step, events in rows]
    path.write_text("".join(lines) + cut)


def test_the_last_attempt_at_a_step_is_what_counts(tmp_path):
    a, b, c, d = ([user, 0, 5, 9] for user in range(4))
    # Two ranks; step 2 is begun, cut by a kill, made again, and made once more by another job.
    write(tmp_path, 0, 0, 0, [(1, [a]), (2, [c])])
    write(tmp_path, 0, 0, 1, [(1, [b])], cut='{"step": 2, "ev')
    write(tmp_path, 0, 1, 0, [(2, [c])])
    write(tmp_path, 0, 1, 1, [(2, [d])])
    write(tmp_path, 1, 0, 0, [(2, [c, d])])
    expected = {tuple(event): 1 for event in (a, b, c, d)}
    assert supervised(tmp_path) == expected
    write(tmp_path, 2, 0, 0, [(2, [c, c])])
    assert supervised(tmp_path) != expected
    write(tmp_path, 2, 0, 0, [(4, [c])])
    with pytest.raises(AssertionError, match="a step is missing"):
        supervised(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_killed_twice_goes_on_with_half_of_its_processes(tmp_path):
    carry_out(tmp_path / "mission", device="cpu", processes=2, seed=Random().randrange(1000))


@pytest.mark.slow
@pytest.mark.multi_gpu
@pytest.mark.timeout(1200)
def test_the_same_on_gpus(tmp_path):
    seed, gpus = Random().randrange(1000), torch.cuda.device_count()
    carry_out(tmp_path / "mission", device="cuda", processes=gpus, seed=seed, together=True)
