"""`torchx run -s slurm` on a Slurm cluster of two nodes that the test starts on this machine.

apt-get install slurmctld slurmd slurm-client munge
pytest -m slow tests/e2e/test_torchx_slurm.py      # a minute or two
"""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gr.runlog import read_lines
from tests.e2e.slurm_cluster import SlurmCluster, missing_programs
from tests.e2e.toy import write_config

ROOT = Path(__file__).parents[2]
MISSING = missing_programs()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"needs {', '.join(MISSING)}: apt-get install slurmctld slurmd slurm-client munge",
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def submit(cluster, job_dir, *arguments):
    """Submit to two nodes; return the job's number."""
    command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "slurm"]
    command += ["-cfg", f"partition=debug,time=10,job_dir={job_dir}"]
    command += ["launch/components.py:train", "-j", "2x1", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True
    )
    # TorchX asks sacct for the state next, which this cluster has no database for; the job is in.
    found = re.search(r"^slurm://torchx/(\d+)$", done.stdout, re.M)
    assert found, done.stdout + done.stderr
    return found[1]


def output(job_dir):
    texts = [path.read_text() for path in sorted(job_dir.glob("slurm-*"))]
    return "\n".join(texts)


def test_a_job_on_two_nodes_trains(cluster, log, tmp_path):
    config = write_config(tmp_path, log)
    job_dir = tmp_path / "job"
    job = submit(cluster, job_dir, "--config", str(config))
    assert cluster.run("squeue", "-h", "-j", job, "-o", "%T")
    cluster.wait_for_job(job, timeout_s=240)
    text = output(job_dir)
    assert "2 process(es) on cpu" in text, text[-6000:] + cluster.logs()
    # Each node ran once, from the copy of the repository, without what .torchxignore names.
    for node in (0, 1):
        assert f"node {node} of 2: job {job} meets at 127.0.0.1:" in text
        assert (job_dir / f"slurm-{job}-train-{node}.out").is_file()
    assert (job_dir / "gr" / "cli.py").is_file()
    assert not (job_dir / "docs").exists()
    last = read_lines(tmp_path / "run" / "eval.jsonl")[-1]
    assert (last["window"], last["num_examples-click"]) == ("all", 48 * 3 * 2 * 4)
    assert (tmp_path / "run" / "job.txt").read_text().strip() == job


def test_a_job_that_failed_is_requeued_and_goes_on(cluster, log, tmp_path):
    """A rank is killed and torchrun may not start it again, so the job as a whole fails once."""
    config = write_config(tmp_path, log)
    run, job_dir = tmp_path / "run", tmp_path / "job"
    slow = ["data.sessions_per_partition=1", "checkpoint.every_steps=2"]
    retry = ["--cluster_set", "restarts=0,retries=1"]
    job = submit(cluster, job_dir, "--config", str(config), *retry, *slow)
    deadline = time.monotonic() + 200
    while not ((run / "metrics.jsonl").is_file() and len(read_lines(run / "metrics.jsonl")) > 1):
        assert time.monotonic() < deadline, output(job_dir)[-6000:] + cluster.logs()
        time.sleep(0.02)
    rank(job, 1).send_signal(signal.SIGKILL)
    cluster.wait_for_job(job, timeout_s=300)
    # srun's output files are those of the last start.
    assert "resumed from step" in output(job_dir), output(job_dir)[-6000:] + cluster.logs()
    last = read_lines(run / "eval.jsonl")[-1]
    assert (last["window"], last["num_examples-click"]) == ("all", 48 * 3 * 2 * 4)
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl")]
    assert steps == sorted(set(steps))


def test_a_sweep_of_jobs(cluster, log, tmp_path):
    config = write_config(tmp_path, log)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"base: {config}\noutput: {tmp_path}/out\nseeds: [0, 1]\njobs: 2\nj: 2x1\n"
        "scheduler: slurm\nscheduler_args: {partition: debug}\noverrides: [max_steps=4]\n"
    )
    command = [sys.executable, "-m", "launch", "sweep", str(sweep)]
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "text": True, "capture_output": True}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr + cluster.logs()
    assert "[2/2" in done.stdout
    handles = [path.read_text() for path in (tmp_path / "out" / "logs").glob("*.job")]
    assert len(set(handles)) == 2
    assert all(handle.startswith("slurm://") for handle in handles)
    assert (tmp_path / "out" / "report.csv").is_file()
    # All finished: nothing is submitted.
    done = subprocess.run(command, **options)
    assert "2 runs, 2 finished before" in done.stdout


def rank(job, number):
    """Return the process of a rank of a job."""
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if (environment.get("TORCHELASTIC_RUN_ID"), environment.get("RANK")) == (
                job,
                str(number),
            ):
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    raise AssertionError(f"job {job} has no rank {number}")
