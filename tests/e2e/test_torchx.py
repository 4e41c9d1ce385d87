"""Whole jobs through TorchX on this machine, two nodes of two processes each, with ranks killed.

pytest -m slow tests/e2e/test_torchx.py      # a minute or two
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gr.checkpoint import CheckpointManager
from gr.runlog import read_lines
from tests.dist import run_distributed
from tests.e2e.toy import run, write_config, write_log

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def long_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    return write_config(folder, write_log(folder, users=80))


def submit(config, run_dir, *overrides, j="2x2", cluster="restarts=3"):
    """Start a local job, its output in a pipe."""
    command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd"]
    command += ["launch/components.py:train", "--config", str(config), "-j", j]
    command += ["--cluster_set", cluster, f"run_dir={run_dir}", "data.sessions_per_partition=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *overrides], cwd=ROOT, env=environment, **pipes)


def train_whole_and_in_two_parts(config, folder):
    for name, overrides in (
        ("whole", ("max_steps=16",)),
        ("parts", ("max_steps=8",)),
        ("parts", ("max_steps=16", "resume=true")),
    ):
        run(Path(config), f"run_dir={folder}/{name}", *overrides)


def test_four_ranks_resume_bit_for_bit(tmp_path):
    config = write_config(tmp_path, write_log(tmp_path))
    arguments = (str(config), str(tmp_path))
    run_distributed(train_whole_and_in_two_parts, 4, *arguments, timeout_s=400)
    rows = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    keys = ("step", "train/loss", "grad_norm")
    whole, parts = ([[row[key] for key in keys] for row in each] for each in rows)
    assert whole == parts
    assert [row[0] for row in whole] == [4, 8, 12, 16]


def finish(job, status=0):
    output, _ = job.communicate(timeout=280)
    assert job.returncode == status, output[-5000:]
    return output


def timeless(run):
    rows = [*read_lines(run / "metrics.jsonl"), *read_lines(run / "eval.jsonl")]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def ranks(job):
    """Return rank -> process of a running job."""
    found = {}
    for process in psutil.Process(job.pid).children(recursive=True):
        try:
            line = process.cmdline()
            if line[1:4] == ["-u", "-m", "gr"] or line[2:4] == ["-m", "gr"]:
                found[int(process.environ()["RANK"])] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def kill_after(job, run, step, rank):
    """SIGKILL one rank once the run has logged a step; return the step of the newest checkpoint."""
    deadline = time.monotonic() + 240
    while True:
        assert time.monotonic() < deadline, "the job does not get there"
        assert job.poll() is None, job.communicate()[0][-5000:]
        rows = read_lines(run / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step and len(ranks(job)) == 4:
            break
        time.sleep(0.01)
    saved = CheckpointManager(run / "checkpoints").latest()
    ranks(job)[rank].send_signal(signal.SIGKILL)
    return saved


@pytest.fixture(scope="module")
def unbroken(long_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    output = finish(submit(long_config, folder))
    assert "4 process(es) on cpu" in output
    assert "node 1 of 2: job train-run-" in output
    return folder


def test_a_local_job_of_two_nodes_scores_every_event_once(unbroken):
    last = read_lines(unbroken / "eval.jsonl")[-1]
    assert (last["window"], last["num_examples-click"]) == ("all", 80 * 3 * 2 * 4)
    assert last["ne-click"] < 0.9


def test_ranks_killed_twice_change_no_bit(long_config, unbroken, tmp_path):
    folder = tmp_path / "run"
    job = submit(long_config, folder)
    first = kill_after(job, folder, 20, rank=3)
    second = kill_after(job, folder, 44, rank=0)
    output = finish(job)
    assert 0 < first < second
    assert output.count("resumed from step") == 2
    assert "lost contact with another rank" in output
    assert timeless(folder) == timeless(unbroken)


def test_a_run_directory_of_another_job_is_refused_also_after_restarts(long_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    output = finish(submit(long_config, tmp_path / "run", j="1x2", cluster="restarts=1"), status=1)
    assert output.count("run_dir=") >= 2
    assert "resume=true" in output
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_node_that_does_not_come(long_config, tmp_path):
    script = tmp_path / "job.json"
    code = (
        "import json, sys; from launch.job import train_job; from launch.config import *;"
        f"app = train_job({str(long_config)!r}, ['run_dir={tmp_path}/run'], j='2x1',"
        "cluster=ClusterConfig(join_timeout_s=3));"
        f"json.dump(app.roles[0].args, open({str(script)!r}, 'w'))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    _, text = json.loads(script.read_text())
    text = text.replace("${replica_id}", "0").replace("${app_id}", "17")
    text = text.replace("$${${rank0_env}:-localhost}", "localhost")
    done = subprocess.run(["bash", "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "node 0 of 2: job 17 meets at localhost:" in done.stderr
    assert "waiting up to 3 s for all nodes" in done.stderr
    assert "RendezvousTimeoutError" in done.stderr
    assert not (tmp_path / "run").exists()
