import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torchx import specs

from gr.config import TrainConfig
from gr.config_io import load_config
from launch import submit
from launch import sweep as sweep_module
from launch.__main__ import main
from launch.config import SweepConfig, VariantConfig
from launch.sweep import LocalRuns, config_hash, describe, expand, run_sweep, visible_gpus

RUN = """
data: {log: absent, num_items: 9, num_negatives: 2}
embeddings:
  tables:
    item: {num_embeddings: 10, dim: 8, features: [item_id, target_item_id, negative_item_id]}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.yaml"
    path.write_text(RUN)
    return str(path)


def sweep_of(base, tmp_path, **fields):
    return SweepConfig(base=base, output=str(tmp_path / "out"), **fields)


def loaded(member):
    return load_config(TrainConfig, member.base, [*member.overrides, "run_dir=x"])[0]


AXES = {
    "optim.lr": st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=2, unique=True),
    "model.num_layers": st.lists(st.integers(1, 9), min_size=1, max_size=2, unique=True),
    "model.head.ranking_hidden": st.lists(
        st.lists(st.integers(1, 64), max_size=2), min_size=1, max_size=2, unique_by=tuple
    ),
}


@settings(deadline=None, max_examples=3)
@given(
    st.fixed_dictionaries({}, optional=AXES),
    st.lists(st.integers(1, 99), min_size=0, max_size=2, unique=True),
    st.lists(st.integers(0, 99), min_size=1, max_size=2, unique=True),
    st.booleans(),
)
def test_expansion_is_the_product(base, grid, together, seeds, named):
    sizes = [len(values) for values in (*grid.values(), together or [0], seeds, range(1 + named))]
    assume(math.prod(sizes) <= 8)  # a configuration takes a tenth of a second to read
    zipped = {"log_every": together, "max_steps": [n + 1 for n in together]} if together else {}
    variants = (
        {"a": VariantConfig(), "b": VariantConfig(overrides=("model.dim=16",))} if named else {}
    )
    config = SweepConfig(
        base=base, output="o", grid=grid, zip=zipped, seeds=tuple(seeds), runs=variants, limit=99
    )
    found = [
        (
            run.model.dim,
            run.optim.lr,
            run.model.num_layers,
            run.model.head.ranking_hidden,
            run.log_every,
            run.max_steps,
            run.seed,
        )
        for run in map(loaded, expand(config))
    ]
    expected = [
        (dim, lr, layers, tuple(hidden), *row, seed)
        for dim, lr, layers, hidden, row, seed in itertools.product(
            [64, 16] if named else [64],
            grid.get("optim.lr", [1e-3]),
            grid.get("model.num_layers", [2]),
            grid.get("model.head.ranking_hidden", [(128,)]),
            [(n, n + 1) for n in together] or [(10, 0)],
            seeds,
        )
    ]
    assert sorted(found) == sorted(expected)


def test_the_id_is_of_the_configuration_not_of_how_it_was_written(base, tmp_path):
    (one,) = expand(sweep_of(base, tmp_path, overrides=("model.dim=16",)))
    (two,) = expand(sweep_of(base, tmp_path / "b", grid={"model.dim": [16]}))
    (three,) = expand(sweep_of(base, tmp_path, grid={"model.dim": [32]}))
    assert one.id == two.id != three.id
    resolved = load_config(TrainConfig, base, ["model.dim=16", "run_dir=y", "resume=true"])[1]
    assert config_hash(resolved) == one.id


def test_a_variant_may_have_a_base_of_its_own(base, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(f"base: {base}\nmodel: {{dim: 40}}")
    config = sweep_of(
        base, tmp_path, runs={"a": VariantConfig(), "b": VariantConfig(base=str(other))}
    )
    assert [loaded(member).model.dim for member in expand(config)] == [64, 40]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": {"seed": [1]}}, "seed is set by the sweep"),
        ({"overrides": ("run_dir=x",)}, "run_dir is set by the sweep"),
        ({"runs": {"a": VariantConfig(overrides=("resume=true",))}}, "resume is set by the sweep"),
        ({"runs": {"a/b": VariantConfig()}}, "a name may hold letters"),
        ({"seeds": tuple(range(17))}, "17 runs, limit is 16"),
        ({"grid": {"model.dim": [16, 16]}}, "are the same configuration"),
        ({"grid": {"modle.dim": [16]}}, r"run 'dim=16', seed 0: override.*Did you mean model\?"),
    ],
)
def test_a_sweep_that_cannot_be_expanded(base, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        expand(sweep_of(base, tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": {"a": 3}}, r"grid\.a: expected a list of values, found 3"),
        ({"grid": {"a": []}}, r"grid\.a: expected a list"),
        ({"zip": {"a": [1], "b": [1, 2]}}, "lists of one length"),
        ({"grid": {"a": [1]}, "zip": {"a": [1]}}, "a is in grid and in zip"),
        ({"seeds": (1, 1)}, "none twice"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"scheduler_args": {"time": "1:00"}}, "scheduler_args and cluster are for jobs"),
    ],
)
def test_a_sweep_that_contradicts_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(base="b", output="o", **fields)


def finish(member, window="all"):
    """Write what a finished run leaves behind."""
    member.run_dir.mkdir(parents=True, exist_ok=True)
    resolved = load_config(
        TrainConfig, member.base, [*member.overrides, f"run_dir={member.run_dir}"]
    )[1]
    OmegaConf.save(resolved, member.run_dir / "config.yaml")
    row = {"window": window, "step": 3, "hr@10": 0.25 + loaded(member).seed / 8}
    (member.run_dir / "eval.jsonl").write_text(json.dumps(row) + "\n")


def test_finished_runs_are_skipped_others_resumed(base, tmp_path):
    config = sweep_of(base, tmp_path, seeds=(0, 1, 2))
    new, half, done = members = expand(config)
    finish(done)
    finish(half, window="2022-04-25")
    assert [m.is_finished() for m in members] == [False, False, True]
    assert "resume=true" not in new.command()
    assert "resume=true" in half.command()
    assert [line.split()[0] for line in describe(members).splitlines()] == ["to", "to", "finished"]
    # A line that a kill cut short does not finish a run.
    (new.run_dir).mkdir(parents=True)
    (new.run_dir / "eval.jsonl").write_text('{"window": "all"}')
    assert not new.is_finished()
    ran = []

    def submit(member):
        ran.append(member)
        finish(member)
        return 0

    assert run_sweep(config, members, say=lambda line: None, submit=submit)
    assert sorted(m.seed for m in ran) == [0, 1]
    report = (Path(config.output) / "report.md").read_text()
    assert "0.3750 +/- " in report  # mean of 0.25, 0.375, 0.5
    assert (Path(config.output) / "summary.csv").is_file()


def test_a_failed_run_does_not_stop_the_others(base, tmp_path, monkeypatch):
    config = sweep_of(base, tmp_path, seeds=(0, 1, 2), jobs=2)
    members = expand(config)
    monkeypatch.setattr(sweep_module, "_report", lambda config, finished: None)
    said = []

    def submit(member):
        if member.seed == 1:
            return 0  # says so, but wrote no overall evaluation
        if member.seed == 0:
            return 9
        finish(member)
        return 0

    assert not run_sweep(config, members, say=said.append, submit=submit)
    text = "\n".join(said)
    assert text.count("FAILED") == 2
    assert "exit status 9" in text
    assert str(members[0].log) in text
    assert [m.is_finished() for m in members] == [False, False, True]


def test_as_many_run_at_once_as_jobs_says(base, tmp_path, monkeypatch):
    config = sweep_of(base, tmp_path, seeds=tuple(range(6)), jobs=3)
    monkeypatch.setattr(sweep_module, "_report", lambda config, finished: None)
    lock, now, most = threading.Lock(), [0], [0]

    def submit(member):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return 1

    run_sweep(config, expand(config), say=lambda line: None, submit=submit)
    assert most[0] == 3


def test_a_run_is_a_process_whose_output_is_kept(base, tmp_path, monkeypatch):
    (member,) = expand(sweep_of(base, tmp_path, grid={"model.head.ranking_hidden": [[8, 4]]}))
    assert member.command()[:4] == [sys.executable, "-m", "gr", "train"]
    assert "model.head.ranking_hidden=[8, 4]" in member.command()
    script = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES')); raise SystemExit(7)"
    monkeypatch.setattr(type(member), "command", lambda self: [sys.executable, "-c", script])
    assert LocalRuns(1, 2, gpus=["4", "GPU-a"])(member) == 7
    assert member.log.read_text() == "4,GPU-a\n"


def test_runs_at_once_share_the_gpus(base, tmp_path, monkeypatch):
    members = expand(sweep_of(base, tmp_path, seeds=tuple(range(6)), j="1x2"))
    seen, lock, now = [], threading.Lock(), set()

    def fake(command, env, **rest):
        share = env["CUDA_VISIBLE_DEVICES"]
        with lock:
            assert share not in now
            now.add(share)
        time.sleep(0.05)
        with lock:
            now.discard(share)
            seen.append(share)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep_module.subprocess, "run", fake)
    runs = LocalRuns(3, 2, gpus=list("01234567"))
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(runs, members)) == [0] * 6
    assert set(seen) == {"0,1", "2,3", "4,5"}
    # Fewer GPUs than runs at once: they take turns on them.
    shared = LocalRuns(3, 1, gpus=["0", "1"])
    assert sorted(shared._shares.get()[0] for _ in range(3)) == ["0", "0", "1"]
    with pytest.raises(ValueError, match="asks for 4 GPUs a run, but this machine has 2"):
        LocalRuns(1, 4, gpus=["0", "1"])


@pytest.mark.parametrize(
    ("cores", "jobs", "processes", "expected"),
    [(2, 2, 1, "1"), (16, 3, 1, "5"), (16, 2, 4, "2"), (2, 8, 1, "1"), (8, 1, 1, "8")],
)
def test_runs_at_once_share_the_cores(
    base, tmp_path, monkeypatch, cores, jobs, processes, expected
):
    (member,) = expand(sweep_of(base, tmp_path))
    seen = []

    def fake(command, env, **rest):
        seen.append(env["OMP_NUM_THREADS"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep_module.subprocess, "run", fake)
    monkeypatch.setattr(sweep_module.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    LocalRuns(jobs, processes, gpus=[])(member)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    LocalRuns(jobs, processes, gpus=[])(member)
    assert seen == [expected, "3"]  # what the user has set stays


def test_gpus_of_this_machine(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sweep_module.shutil, "which", lambda name: name)
    listing = "GPU 0: NVIDIA H100 (UUID: x)\nGPU 1: NVIDIA H100 (UUID: y)\n"
    done = subprocess.CompletedProcess([], 0, stdout=listing)
    monkeypatch.setattr(sweep_module.subprocess, "run", lambda *a, **k: done)
    assert visible_gpus() == ["0", "1"]


def test_a_run_may_have_several_processes(base, tmp_path):
    (member,) = expand(sweep_of(base, tmp_path, j="1x4"))
    command = " ".join(member.command()[1:])
    assert command.startswith(
        "-m torch.distributed.run --standalone --nproc-per-node=4 -m gr train"
    )
    with pytest.raises(ValueError, match="j=2x4 asks for 2 nodes, but scheduler is empty"):
        expand(sweep_of(base, tmp_path, j="2x4"))


def stand_in(member, seconds=0.0, status=0):
    """Return a job that leaves what a finished run leaves, for TorchX to run."""
    script = f"sleep {seconds}; echo ran >> {member.log}.count; "
    if status == 0:
        row = json.dumps({"window": "all", "step": 3, "hr@10": 0.5})
        script += f"mkdir -p {member.run_dir}; echo '{row}' > {member.run_dir}/eval.jsonl; "
    script += f"exit {status}"
    role = specs.Role(name="train", image="", entrypoint="bash", args=["-c", script])
    return specs.AppDef(name="stand-in", roles=[role])


def test_runs_as_torchx_jobs(base, tmp_path, monkeypatch):
    config = sweep_of(base, tmp_path, seeds=(0, 1, 2), jobs=3, scheduler="local_cwd", j="2x2")
    members = {str(member.run_dir): member for member in expand(config)}

    def job(base, arguments, *, j, cluster, name):
        assert j == "2x2"
        (folder,) = (text for text in arguments if text.startswith("run_dir="))
        member = members[json.loads(folder.removeprefix("run_dir="))]
        assert name == f"sweep-{member.id}"
        return stand_in(member, status=3 if member.seed == 1 else 0)

    monkeypatch.setattr(submit, "train_job", job)
    monkeypatch.setattr(sweep_module, "_report", lambda config, finished: None)
    said = []
    runs = submit.TorchXRuns(config)
    members_of = list(members.values())
    assert not run_sweep(config, members_of, say=said.append, submit=runs, cancel=runs.cancel)
    assert [member.is_finished() for member in members_of] == [True, False, True]
    assert "seed 1: FAILED" in "\n".join(said)
    assert members_of[1].log.read_text().startswith("local_cwd://")


SQUEUE = """#!/bin/sh
case "$3" in
17) head -1 {listing}; sed -i 1d {listing};;
*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
esac
"""


def test_a_job_that_still_runs_is_waited_for_not_submitted_again(base, tmp_path, monkeypatch):
    """A stand-in for Slurm's squeue: the job is listed twice, then it is gone."""
    config = sweep_of(base, tmp_path, scheduler="slurm", cluster="")
    (member,) = expand(config)
    listing = tmp_path / "listing"
    listing.write_text("RUNNING\nRUNNING\n")
    tool = tmp_path / "squeue"
    tool.write_text(SQUEUE.format(listing=listing))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(submit, "POLL_S", 0.01)
    runs = submit.TorchXRuns(config)
    monkeypatch.setattr(runs, "_submit", lambda member: pytest.fail("submitted"))
    member.log.parent.mkdir(parents=True)
    member.log.with_suffix(".job").write_text("slurm://torchx/17\n")
    finish(member)
    assert runs(member) == 0
    assert listing.read_text() == ""
    # Gone before we looked: a new job goes on with the run.
    monkeypatch.setattr(runs, "_submit", lambda member: "slurm://torchx/18")
    assert runs(member) == 0
    assert member.log.with_suffix(".job").read_text() == "slurm://torchx/18\n"
    # A controller that does not answer says nothing about the job.
    tool.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    assert runs._is_active("slurm://torchx/18")


def test_schedulers_that_are_not_there(base, tmp_path):
    with pytest.raises(ValueError, match=r"scheduler: expected one of .*slurm.*found 'slrum'"):
        submit.TorchXRuns(sweep_of(base, tmp_path, scheduler="slrum"))
    wrong = sweep_of(base, tmp_path, scheduler="slurm", scheduler_args={"partition": 3})
    with pytest.raises(ValueError, match=r"scheduler_args: .*partition"):
        submit.TorchXRuns(wrong)


def test_command_line(base, tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"base: {base}\noutput: {tmp_path}/out\ngrid: {{model.dim: [16, 32]}}")
    assert main(["sweep", str(path), "--dry-run", "seeds=[0, 1]"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4
    assert all(line.startswith("to run") for line in out)
    assert "model.dim=32 seed=1" in out[3]
    for argv, expected in (
        (["sweep", "absent.yaml"], "absent.yaml: no such file"),
        (["sweep", str(path), "limit=1"], "2 runs, limit is 1"),
        (["sweep", str(path), "jbos=2"], "Did you mean jobs?"),
    ):
        assert main(argv) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_launch_is_free_of_torch():
    code = "import sys, launch.__main__; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
