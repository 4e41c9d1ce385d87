"""One job from the log to the model, killed twice and resumed on half of its processes.

    python -m tests.e2e.mission FOLDER     # on all GPUs of this machine, or with --device cpu

`torchx run` trains HSTU on a session-end log of many partitions through the stream: tables sharded,
fused row-wise AdamW, the kernels, fp8 (configs/synthetic_urn_sharded.yaml). First three seeds that
nothing disturbs; then one of them again, of which a rank is killed with SIGKILL at a drawn step,
and, once it has resumed, the whole job at another; then resumed on half as many processes. At the
end every event of the log was supervised exactly once, and the run's NE is as near to that of the
undisturbed run of its seed as seeds are to each other.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import psutil

from gr.checkpoint import complete_steps
from gr.config import TrainConfig
from gr.config_io import load_config
from gr.runlog import read_lines
from pipelines.stream import SessionStream
from pipelines.synthetic.config import SyntheticConfig
from pipelines.synthetic.synthesize import synthesize
from tests.e2e.supervised import FOLDER, logged, supervised, write_interpreter

ROOT = Path(__file__).parents[2]
CONFIG = "configs/synthetic_urn_sharded.yaml"
SEEDS = (0, 1, 2)
ON_CPU = (
    # What FBGEMM has no CPU form of, and a model of a size for it.
    *("device=cpu", "model.hstu.precision=bf16", "embeddings.weights=fp32"),
    *("embeddings.momentum=hbm", "embeddings.update_rule=row_wise_adagrad"),
    *("embeddings.optimizer.lr=0.02", "data.max_history_tokens=32", "model.dim=32"),
    *("model.num_layers=2", "model.hstu.num_heads=2", "model.hstu.qk_dim=8", "model.hstu.v_dim=8"),
    "data.sessions_per_partition=1",
)
SMALL_LOG = (
    *("polya_urn.num_users=60", "polya_urn.num_timestamps=8", "polya_urn.mean_events=8"),
    *("polya_urn.min_events=3", "partitions=8"),
)
TIMEOUT_S = 400


@dataclass
class Mission:
    """Where it happens, and what all its runs share."""

    folder: Path
    processes: int
    overrides: tuple[str, ...]
    records: dict[str, Path] = field(default_factory=dict)
    num_jobs: int = 0
    said: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def run_dir(self, name: str) -> Path:
        return self.folder / name

    def submit(self, name: str, processes: int, *overrides: str) -> subprocess.Popen:
        """Start a job of one node, what it prints in NAME.txt."""
        records = self.folder / "records" / name / str(self.num_jobs)
        self.records[name] = records
        self.num_jobs += 1
        interpreter = write_interpreter(self.folder / "python")
        command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd"]
        command += ["launch/components.py:train", "--config", CONFIG, "-j", f"1x{processes}"]
        command += ["--env", f"PYTHON_EXEC={interpreter},{FOLDER}={records}"]
        command += [f"run_dir={self.run_dir(name)}", f"data.log={self.log}"]
        command += [*self.overrides, *overrides]
        with (self.folder / f"{name}.txt").open("a") as output:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def printed(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()

    def finish(self, name: str, job: subprocess.Popen) -> None:
        status = job.wait(timeout=TIMEOUT_S)
        assert status == 0, self.printed(name)[-5000:]

    def wait_for(self, name: str, job: subprocess.Popen, step: int, restart: int) -> None:
        """Return once a job that was restarted so often has logged a step."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            assert time.monotonic() < deadline, self.printed(name)[-5000:]
            assert job.poll() is None, self.printed(name)[-5000:]
            rows = self.rows(name)
            # What the job prints comes late; without a checkpoint it would begin anew.
            is_on = (self.records[name] / str(restart)).is_dir()
            is_on = is_on and bool(complete_steps(self.run_dir(name) / "checkpoints"))
            if rows and rows[-1]["step"] >= step and is_on:
                return
            time.sleep(0.01)

    def rows(self, name: str) -> list[dict]:
        with suppress(FileNotFoundError, json.JSONDecodeError):
            return read_lines(self.run_dir(name) / "metrics.jsonl")
        return []

    def say(self, line: str) -> None:
        self.said.append(line)
        print(line, flush=True)


def ranks(job: subprocess.Popen) -> dict[int, psutil.Process]:
    """Return rank -> process of a job."""
    found = {}
    for process in psutil.Process(job.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "tests.e2e.supervised" in process.cmdline():
                found[int(process.environ()["RANK"])] = process
    return found


def kill_all(job: subprocess.Popen) -> None:
    """SIGKILL all that a job consists of, as a node that loses power does."""
    processes = psutil.Process(job.pid).children(recursive=True)
    for process in [psutil.Process(job.pid), *processes]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()


def disturb(mission: Mission, num_steps: int, random: Random) -> None:
    """Train, with two kills on the way, and finish on half of the processes."""
    name, every = "killed", 10
    first = random.randrange(every + 2, num_steps // 2 - every)
    second = random.randrange(num_steps // 2, num_steps - every)
    job = mission.submit(name, mission.processes)
    mission.wait_for(name, job, first, restart=0)
    rank = random.randrange(mission.processes)
    ranks(job)[rank].kill()
    mission.say(f"rank {rank} killed at step {mission.rows(name)[-1]['step']} of {num_steps}")
    mission.wait_for(name, job, second, restart=1)
    kill_all(job)
    mission.say(f"all killed at step {mission.rows(name)[-1]['step']}")
    rest = max(1, mission.processes // 2)
    mission.finish(name, mission.submit(name, rest, "resume=true"))
    for line in mission.printed(name).splitlines():
        if "resumed from step" in line or "process(es) on" in line:
            mission.say(f"  {line.split(': weights')[0]}")
    assert mission.printed(name).count("resumed from step") == 2


def ne(mission: Mission, name: str) -> float:
    last = read_lines(mission.run_dir(name) / "eval.jsonl")[-1]
    assert last["window"] == "all"
    return last["ne-rating"]


def carry_out(
    folder: Path,
    *,
    device: str,
    processes: int,
    seed: int,
    together: bool = False,
    users: int = 0,
) -> list[str]:
    """Carry it all out; return the report.

    Args:
        folder: new; everything is written there.
        device: cuda, or cpu with a smaller model and log.
        processes: that the job starts with.
        seed: of the steps and the rank that are killed.
        together: all runs at once, where there is room for them.
        users: in the log; 0: as many as its configuration says.

    Raises:
        AssertionError: if an event is missing or there twice, or the NE is off.
    """
    folder.mkdir(parents=True)
    on_cpu = device == "cpu"
    mission = Mission(folder, processes, ON_CPU if on_cpu else ("device=cuda",))
    log = [f"output={mission.log}", *(SMALL_LOG if on_cpu else ())]
    log += [f"polya_urn.num_users={users}"] if users else []
    synthesize(load_config(SyntheticConfig, "configs/synthetic_urn_log.yaml", log)[0])
    events = logged(mission.log)
    overrides = [*mission.overrides, f"data.log={mission.log}"]
    config, _ = load_config(TrainConfig, CONFIG, overrides)
    num_steps = SessionStream(config.data, seed=0).num_steps
    mission.say(
        f"{events.total():,} events, {num_steps} steps, {processes} x {device}, kills {seed}"
    )

    start = time.monotonic()
    jobs = {}
    for s in SEEDS:
        jobs[f"seed_{s}"] = mission.submit(f"seed_{s}", processes, f"seed={s}")
        if not together:
            mission.finish(f"seed_{s}", jobs[f"seed_{s}"])
    disturb(mission, num_steps, Random(seed))
    for name, job in jobs.items():
        mission.finish(name, job)

    for name in (*jobs, "killed"):
        assert supervised(folder / "records" / name) == events, f"{name}: not each event once"
    undisturbed = [ne(mission, name) for name in jobs]
    spread, off = max(undisturbed) - min(undisturbed), abs(ne(mission, "killed") - undisturbed[0])
    values = ", ".join(f"{value:.5f}" for value in undisturbed)
    mission.say("every event supervised once, in the killed run and in the others")
    mission.say(f"NE of seeds {SEEDS}: {values} (spread {spread:.5f})")
    mission.say(f"NE killed twice, resumed: {ne(mission, 'killed'):.5f}, off by {off:.5f}")
    mission.say(f"{time.monotonic() - start:.0f} s")
    assert off <= spread
    return mission.said


def main() -> None:
    import torch

    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.mission", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the log and all runs; must not exist")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpus else "cpu")
    parser.add_argument("--processes", type=int, default=gpus or 2, help="that the job starts with")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1000, help="of the kills")
    parser.add_argument("--users", type=int, default=0, help="in the log, 0 for all of it")
    parser.add_argument("--together", action="store_true", help="all runs at once")
    options = parser.parse_args()
    folder = options.folder.resolve()
    given = vars(options) | {"folder": folder}
    carry_out(**given)


if __name__ == "__main__":
    main()
