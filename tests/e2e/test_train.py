"""Runs from the log to the metrics, in one process, several, and across kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss

from gr import cli
from gr.checkpoint import CheckpointManager
from gr.evaluate import EVALUATE
from gr.runlog import read_lines
from gr.trainer import EVALUATION
from pipelines.config import SessionizeConfig
from pipelines.manifest import read_manifest
from pipelines.sessionize import sessionize
from tests.dist import run_distributed
from tests.e2e.toy import (
    ACTIONS,
    FEATURES,
    FP8,
    ULTRA,
    ULTRA_ALONE,
    run,
    write_config,
    write_events,
    write_log,
)

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("train")

ROOT = Path(__file__).parents[2]
GROUPS = ("dense", "optimizer", "tables", "objective", "loss_sums", "progress", EVALUATION)


def timeless(run_dir: Path) -> list[dict]:
    rows = [*read_lines(run_dir / "metrics.jsonl"), *read_lines(run_dir / "eval.jsonl")]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def final_state(run_dir: Path) -> dict:
    checkpoints = CheckpointManager(run_dir / "checkpoints", apart=(EVALUATION,))
    step = checkpoints.latest()
    parts = {group: checkpoints.read(step, group) for group in GROUPS}
    state = {f"{g}.{k}": v for g, part in parts.items() for k, v in part.items()}
    assert any(k.startswith("tables.") for k in state)
    assert any(k.startswith("optimizer.") for k in state)
    return state


def assert_equal_runs(a: Path, b: Path) -> None:
    assert timeless(a) == timeless(b)
    state_a, state_b = final_state(a), final_state(b)
    assert state_a.keys() == state_b.keys()
    for key, value in state_a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, state_b[key]), key
        else:
            assert value == state_b[key], key


def lifetime(run_dir: Path) -> dict:
    (row,) = [row for row in read_lines(run_dir / "eval.jsonl") if row["window"] == "all"]
    return row


@pytest.fixture(scope="session")
def finished(tmp_path_factory, log):
    """A run that nothing interrupted."""
    return run(write_config(tmp_path_factory.mktemp("finished"), log))


def test_the_log_of_these_tests_is_what_sessionize_makes(log, tmp_path):
    write_events(tmp_path / "events.parquet")
    made = SessionizeConfig(
        input=str(tmp_path / "events.parquet"),
        output=str(tmp_path / "log"),
        actions=tuple(ACTIONS),
        features=tuple(FEATURES),
        partitions=4,
    )
    sessionize(made)
    ours, theirs = (read_manifest(folder) for folder in (log, tmp_path / "log"))
    # The digests of the files are part of it.
    assert replace(ours, folder=theirs.folder, config=theirs.config) == theirs


def test_the_history_is_what_it_learns_from(finished, tmp_path, log):
    days = [row for row in read_lines(finished / "eval.jsonl") if row["window"] != "all"]
    assert [row["window"] for row in days] == ["2023-11-15", "2023-11-16", "2023-11-17"]
    assert sum(row["num_examples-click"] for row in days) == 48 * 3 * 2 * 4
    without = run(
        write_config(tmp_path, log), "data.max_history_tokens=0", "data.max_session_events=1"
    )
    # An event is in the group of its user with probability 1/3; without history nothing tells.
    assert days[-1]["auc-click"] > 0.75
    assert lifetime(without)["auc-click"] < 0.6
    assert days[-1]["ne-click"] < 0.9 < lifetime(without)["ne-click"]


def test_a_run_repeats_bit_for_bit_with_and_without_overlap(finished, config):
    assert_equal_runs(finished, run(config, "overlap=false"))


def test_kill_and_resume_changes_no_bit(finished, config, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "gr", "train", str(config)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.DEVNULL,
    )
    random = np.random.default_rng()  # any moment will do
    lines = int(random.integers(1, 4))
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= lines):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline, "made no progress"
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not any(row["window"] == "all" for row in read_lines(tmp_path / "run" / "eval.jsonl"))
    assert_equal_runs(finished, run(config, "resume=true"))


def test_stopped_at_every_checkpoint_and_resumed(finished, config):
    steps = max(row["step"] for row in read_lines(finished / "metrics.jsonl"))
    for stop in (8, 9, steps):
        run_dir = run(config, "resume=true", f"max_steps={stop}", "checkpoint.keep=9")
        assert CheckpointManager(run_dir / "checkpoints").latest() == stop
    resumed = run(config, "resume=true")
    assert [r for r in timeless(resumed) if "window" in r] == [
        r for r in timeless(finished) if "window" in r
    ]


def test_checkpoints_are_kept_and_waited_for_as_configured(config, monkeypatch):
    class AskedError(Exception):
        pass

    def ask(folder, **options):
        raise AskedError(options)

    monkeypatch.setattr("gr.train.CheckpointManager", ask)
    with pytest.raises(AskedError) as caught:
        run(config, "timeout_minutes=3", "checkpoint.keep=5", "checkpoint.asynchronous=true")
    assert caught.value.args[0] == {
        "keep": 5,
        "apart": (EVALUATION,),
        "asynchronous": True,
        "timeout_minutes": 3.0,
    }


def test_resuming_without_stored_histories_changes_no_bit(finished, config, tmp_path):
    stopped = run(config, "max_steps=8", "checkpoint.histories=replay")
    assert not list(stopped.glob("checkpoints/*/histories"))
    assert_equal_runs(finished, run(config, "resume=true", "checkpoint.histories=replay"))
    assert len(list(finished.glob("checkpoints/*/histories/histories-0000?.arrow"))) == 2 * 4
    assert not (finished / "histories").exists()


def test_frozen_evaluation_changes_nothing_but_what_is_scored(finished, config, tmp_path):
    frozen = run(config, "eval.mode=frozen", "max_steps=8")
    frozen = run(config, "eval.mode=frozen", "resume=true")
    np.testing.assert_array_equal(losses(frozen), losses(finished))
    days = [row for row in read_lines(frozen / "eval.jsonl") if row["window"] != "all"]
    progressive = [row for row in read_lines(finished / "eval.jsonl") if row["window"] != "all"]
    assert [(row["window"], row["num_examples-click"]) for row in days] == [
        (row["window"], row["num_examples-click"]) for row in progressive
    ]
    # Without a day behind it nothing tells the groups apart; on the third day the histories do.
    assert days[0]["auc-click"] < 0.6 < 0.7 < days[2]["auc-click"]
    whole = run(config, "eval.mode=frozen", f"run_dir={tmp_path / 'whole'}")
    assert timeless(whole) == timeless(frozen)
    assert any(0 < row.get("perf/scoring", 0) < 1 for row in read_lines(frozen / "metrics.jsonl"))


def test_following_a_log_that_grows(tmp_path):
    folder = tmp_path / "segments"
    folder.mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        write_log(tmp_path / name, seed=seed)
        (tmp_path / name / "log").rename(folder / name)
    together = run(write_config(tmp_path, folder))
    (folder / "b").rename(tmp_path / "b" / "log")
    follow = ("data.follow=true", "data.follow_idle_seconds=0.1")
    grown = run(write_config(tmp_path, folder), f"run_dir={tmp_path / 'grown'}", *follow)
    assert len(losses(grown)) < len(losses(together))
    (tmp_path / "b" / "log").rename(folder / "b")
    run(write_config(tmp_path, folder), f"run_dir={grown}", "resume=true", *follow)
    np.testing.assert_array_equal(losses(grown)[-3:], losses(together)[-3:])
    assert lifetime(grown) == lifetime(together)


def losses(run_dir: Path) -> np.ndarray:
    rows = read_lines(run_dir / "metrics.jsonl")
    return np.array([row["train/loss"] for row in rows])


VARIANTS = {
    "replicated": (),
    "sharded": ("embeddings.form=sharded", "embeddings.update_rule=row_wise_adagrad"),
    "session-merged": ("data.anchor=session", "data.layout=merged", "data.context=none"),
}


BALANCED = {
    "tokens": ("data.fill=tokens", "data.budget=300", "data.sessions_per_partition=8"),
    "flops": ("data.fill=flops", "data.budget=3e7", "data.sessions_per_partition=8"),
    "one-batch": (
        "data.fill=tokens",
        "data.budget=1e9",
        "data.sessions_per_partition=8",
        "data.window=none",
        "checkpoint.every_steps=0",
    ),
    "lengths": (
        "data.stochastic_length.selection=weighted",
        "data.stochastic_length.alpha=1.3",
        "data.stochastic_length.balance=true",
        "data.stochastic_length.recalibrate_steps=3",
        "data.prefetch=0",
    ),
}


def train_variants(config: str, folder: str) -> str:
    for name, overrides in VARIANTS.items():
        run(Path(config), f"run_dir={folder}/{name}", *overrides)
    run(Path(config), f"run_dir={folder}/half", "max_steps=12")
    for name, overrides in BALANCED.items():
        run(Path(config), f"run_dir={folder}/{name}", "max_steps=6", *overrides)
    for overrides in (("max_steps=8",), ("resume=true",)):
        plain = (*VARIANTS["sharded"], "overlap=false")
        run(Path(config), f"run_dir={folder}/cut", *plain, *overrides)
    try:
        run(Path(config), f"run_dir={folder}/none", f"optim.lr=0.0{1 + int(os.environ['RANK'])}")
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory, log):
    """The variants, and half a run, each trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    config = str(write_config(folder, log))
    messages = run_distributed(train_variants, 2, config, str(folder), timeout_s=240)
    (folder / "messages.txt").write_text("\n".join(messages))
    return folder


def test_ranks_with_different_configurations(on_two_ranks):
    for message in (on_two_ranks / "messages.txt").read_text().splitlines():
        assert "all ranks must have the same configuration" in message
        assert "lr: 0.01" in message
    assert not (on_two_ranks / "none").exists()


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_learn_what_one_does(on_two_ranks, config, name):
    one, two = run(config, *VARIANTS[name]), on_two_ranks / name
    # Sums in another order differ in the last bits of float32, and training spreads that.
    np.testing.assert_allclose(losses(one), losses(two), rtol=2e-3)
    np.testing.assert_allclose(losses(one)[:2], losses(two)[:2], rtol=1e-5)
    row_one, row_two = lifetime(one), lifetime(two)
    assert row_one["num_examples-click"] == row_two["num_examples-click"]
    assert read_lines(one / "metrics.jsonl")[-1]["flops"] > 0
    assert (
        read_lines(one / "metrics.jsonl")[-1]["flops"]
        == read_lines(two / "metrics.jsonl")[-1]["flops"]
    )
    assert row_one["ne-click"] == pytest.approx(row_two["ne-click"], rel=2e-3)
    assert len((two / "eval.jsonl").read_text().splitlines()) == 4


def test_one_rank_goes_on_where_two_stopped(on_two_ranks, finished, tmp_path):
    shutil.copytree(on_two_ranks / "half", tmp_path / "half")
    resumed = run(on_two_ranks / "run.yaml", f"run_dir={tmp_path / 'half'}", "resume=true")
    np.testing.assert_allclose(losses(finished), losses(resumed), rtol=2e-3)
    assert lifetime(resumed)["num_examples-click"] == lifetime(finished)["num_examples-click"]
    assert lifetime(resumed)["ne-click"] == pytest.approx(lifetime(finished)["ne-click"], rel=2e-3)


@pytest.mark.parametrize("name", ["tokens", "flops", "lengths"])
def test_one_rank_goes_on_with_balanced_batches(on_two_ranks, finished, tmp_path, name):
    shutil.copytree(on_two_ranks / name, tmp_path / name)
    overrides = (f"run_dir={tmp_path / name}", "resume=true", "max_steps=0", *BALANCED[name])
    resumed = run(on_two_ranks / "run.yaml", *overrides)
    for key in ("num_examples-click", "num_examples-watch"):
        assert lifetime(resumed)[key] == lifetime(finished)[key]
    assert lifetime(resumed)["ne-click"] == pytest.approx(lifetime(finished)["ne-click"], rel=0.2)


def test_unequal_batches_of_two_ranks_learn_as_one(on_two_ranks, tmp_path):
    """All sessions are one batch; the ranks' parts of it differ in tokens and targets."""
    one = run(on_two_ranks / "run.yaml", f"run_dir={tmp_path / 'one'}", *BALANCED["one-batch"])
    np.testing.assert_allclose(losses(one), losses(on_two_ranks / "one-batch"), rtol=1e-5)
    assert len(losses(one)) == 1
    weights = [
        CheckpointManager(folder / "checkpoints").read(1, "dense.tokens.action")["weight"]
        for folder in (one, on_two_ranks / "one-batch")
    ]
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-6)


def test_a_resumed_sharded_run_repeats_the_overlapped_one_bit_for_bit(on_two_ranks):
    assert timeless(on_two_ranks / "cut") == timeless(on_two_ranks / "sharded")


def test_sharded_tables_learn_as_replicated_ones(on_two_ranks, config):
    replicated = run(config, "embeddings.update_rule=row_wise_adagrad")
    np.testing.assert_allclose(losses(replicated), losses(on_two_ranks / "sharded"), rtol=2e-3)


def test_dlrm_and_the_other_encoders_run(config, tmp_path):
    for encoder in ("sasrec", "transformer"):
        out = run(
            config, f"run_dir={tmp_path / encoder}", f"model.encoder={encoder}", "max_steps=3"
        )
        assert lifetime(out)["num_examples-retrieval"] > 0
    out = run(
        config,
        f"run_dir={tmp_path / 'dlrm'}",
        "model.encoder=dlrm",
        "model.head.retrieval=false",
        "eval.retrieval=false",
        "data.dense_features=[price]",
        "max_steps=3",
    )
    assert "hr@10" not in lifetime(out)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(ULTRA, id="all"),
        *(
            pytest.param(options, id=name, marks=pytest.mark.slow)
            for name, options in {**ULTRA_ALONE, "fp8": FP8}.items()
        ),
    ],
)
def test_ultra_learns_resumes_and_is_evaluated_as_it_is_served(config, tmp_path, options):
    whole = run(config, f"run_dir={tmp_path / 'whole'}", *options)
    # Merged tokens without a bias learn slowest.
    assert lifetime(whole)["ne-click"] < (0.98 if options == ULTRA_ALONE["merged"] else 0.95)
    assert lifetime(whole)["hr@10"] > 0
    cut = f"run_dir={tmp_path / 'cut'}"
    run(config, cut, *options, "max_steps=8")
    assert_equal_runs(whole, run(config, cut, *options, "resume=true"))

    assert cli.main(["evaluate", str(whole)]) == 0
    assert cli.main(["recommend", str(whole), str(tmp_path / "scores")]) == 0
    scores = pq.read_table(tmp_path / "scores" / "ranking").to_pandas()
    evaluated = read_lines(whole / EVALUATE)[-1]
    assert evaluated["window"] == "all"
    click = scores["click"].astype(float)
    assert evaluated["logloss-click"] == pytest.approx(
        log_loss(scores["click_label"], click), rel=1e-5
    )


def test_what_is_skipped_is_counted_and_written_down(tmp_path):
    log = write_log(tmp_path)
    part = log / "part-00001.parquet"
    table = pq.read_table(part)
    users = table["user_id"].to_pylist()
    users[5] = None
    column = pa.array(users, pa.int64())
    pq.write_table(
        table.set_column(table.schema.get_field_index("user_id"), "user_id", column), part
    )
    config = write_config(tmp_path, log)
    run(config, "data.max_reject_fraction=0.1", "max_steps=6")
    out = run(config, "data.max_reject_fraction=0.1", "resume=true")
    last = read_lines(out / "metrics.jsonl")[-1]
    assert {k: v for k, v in last.items() if k.startswith("data/")} == {
        "data/rejected/null user_id, session_id, start_ts or end_ts": 1
    }
    assert last["examples"] == 48 * 3 * 2 - 1
    (reject,) = read_lines(out / "rejects" / "rank_0.jsonl")
    assert (reject["file"], reject["row"]) == (part.name, 5)


def test_the_resolved_configuration_starts_the_same_run(finished, tmp_path):
    again = run(finished / "config.yaml", f"run_dir={tmp_path / 'again'}", "max_steps=4")
    first = [r for r in timeless(finished) if r["step"] == 4]
    assert [r for r in timeless(again) if r["step"] == 4 and "examples" in r] == first
    assert json.loads(json.dumps(first)) == first


def test_another_log_is_another_run(finished, tmp_path):
    other = write_log(tmp_path, seed=1)
    assert timeless(run(write_config(tmp_path, other), "max_steps=4")) != timeless(finished)[:1]
