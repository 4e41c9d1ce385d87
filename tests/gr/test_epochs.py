"""Runs over many epochs of user sequences: what they report, resume and learn."""

import json
import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr.checkpoint import CheckpointManager
from gr.cli import main
from gr.config import TrainConfig
from gr.config_io import load_config
from gr.evaluate import evaluate, run_config
from gr.logs import open_log
from gr.parallel import World
from gr.runlog import read_lines
from gr.train import train
from gr.trainer import Trainer
from pipelines.leave_one_out import LeaveOneOutStream
from tests.dist import run_distributed

NUM_ITEMS, NUM_USERS = 30, 40
CONFIG = f"""
run_dir: RUN
data:
  log: LOG
  window: epoch
  leave_one_out: {{epochs: 4, users_per_batch: 16, scored_users_per_batch: 24}}
  layout: merged
  supervise: all
  max_history_tokens: 8
  num_items: {NUM_ITEMS}
  prefetch: 0
embeddings:
  form: replicated
  update_rule: adamw
  optimizer: {{lr: 0.02}}
  tables:
    item: {{num_embeddings: {NUM_ITEMS + 1}, dim: 10, features: [item_id, target_item_id]}}
model:
  dim: 10
  hstu: {{num_heads: 1, qk_dim: 10, v_dim: 10, scaling_length: 9, bias: position_time,
    dropout: 0.1}}
  encoding: {{position: from_start, position_buckets: 16, dropout: 0.1}}
loss: {{position_negatives: 8, temperature: 0.1}}
optim: {{lr: 0.01, clip_norm: 0}}
eval: {{mode: frozen, ks: [1, 10], filter_seen: true}}
log_every: 3
deterministic: true
device: cpu
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with events in which the next item follows from the last one."""
    folder = tmp_path_factory.mktemp("epochs")
    rng, rows = random.Random(0), []
    for user in range(NUM_USERS):
        item = rng.randrange(NUM_ITEMS)
        for time in range(rng.randint(6, 14)):
            rows.append({"user_id": user, "item_id": item, "timestamp": 60 * time})
            item = (item + 7) % NUM_ITEMS if rng.random() < 0.9 else rng.randrange(NUM_ITEMS)
    rng.shuffle(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "events.parquet")
    (folder / "run.yaml").write_text(CONFIG.replace("LOG", str(folder / "events.parquet")))
    return folder


def run(folder: Path, name: str, *overrides: str) -> Path:
    """Train in this process and return the run directory."""
    overrides = (f"run_dir={folder / name}", *overrides)
    config, resolved = load_config(TrainConfig, folder / "run.yaml", overrides)
    train(config, resolved, overrides)
    return folder / name


@pytest.fixture(scope="module")
def finished(folder):
    return run(folder, "whole")


def events_by_hand(folder: Path) -> list[list[tuple[int, int]]]:
    """Return (item, time) of each user in order."""
    rows = pq.read_table(folder / "events.parquet").to_pylist()
    of_user = [[r for r in rows if r["user_id"] == user] for user in range(NUM_USERS)]
    return [
        sorted(((r["item_id"], r["timestamp"]) for r in events), key=lambda e: e[1])
        for events in of_user
    ]


@pytest.mark.parametrize("hold_out", ["test", "validation"])
def test_metrics_are_those_of_brute_force(folder, finished, hold_out, tmp_path):
    """Ranks by Python loops over the catalogue, from the weights that the run ended with."""
    cut = 0 if hold_out == "test" else 1
    overrides = (f"data.leave_one_out.hold_out={hold_out}",)
    config = run_config(finished, overrides)
    evaluate(config, finished, overrides=overrides)
    (row,) = read_lines(finished / "evaluate.jsonl")
    source = open_log(config.data)
    trainer = Trainer(config, World(0, 1, torch.device("cpu")), utc_offset=0, sequences_per_step=16)
    checkpoints = CheckpointManager(finished / "checkpoints", apart=("evaluation",))
    trainer.load_learnt(checkpoints, checkpoints.latest())
    weight_ED = trainer.tables.full_weight("item").detach()
    unit_ED = weight_ED / weight_ED.norm(dim=1, keepdim=True)
    vectors, targets = [], []
    handle = trainer.model.retrieval.register_forward_hook(lambda _, __, y: vectors.append(y))
    trainer.evaluation.roll(0)
    for batch in LeaveOneOutStream(config.data, source.users, seed=0).score(0):
        trainer.score_step(batch)
        targets += batch.ids["target_item_id"].values().tolist()
    handle.remove()
    user_RD = torch.cat(vectors)
    ranks = []
    for user, events in enumerate(events_by_hand(folder)):
        events = events[: len(events) - cut]
        *history, (target, _) = events
        assert targets[user] == target
        seen = {item for item, _ in history[-8:]} - {target}
        scores = [float(user_RD[user] @ unit_ED[e + 1]) for e in range(NUM_ITEMS)]
        better = [e for e in range(NUM_ITEMS) if e not in seen and scores[e] > scores[target]]
        ranks.append(1 + len(better))
    assert row["num_examples-retrieval"] == NUM_USERS
    for k in (1, 10):
        assert row[f"hr@{k}"] == pytest.approx(sum(r <= k for r in ranks) / NUM_USERS)
        gains = [1 / math.log2(r + 1) for r in ranks if r <= k]
        assert row[f"ndcg@{k}"] == pytest.approx(sum(gains) / NUM_USERS)
    assert row["mrr"] == pytest.approx(sum(1 / r for r in ranks) / NUM_USERS)


def test_every_epoch_is_scored_and_the_last_is_the_result(finished):
    rows = read_lines(finished / "eval.jsonl")
    assert [row["window"] for row in rows] == [*(f"epoch {i:04d}" for i in (1, 2, 3, 4)), "all"]
    metrics = [{k: v for k, v in row.items() if k != "window"} for row in rows]
    assert metrics[-1] == metrics[-2]
    assert all(row["num_examples-retrieval"] == NUM_USERS for row in rows)
    # The rule of the data is learnt: a guess hits one time in 30.
    assert rows[-1]["hr@1"] > 0.3 > 0.15 > rows[0]["hr@1"]


def test_the_newest_checkpoint_scores_as_the_last_epoch(folder, finished):
    config = run_config(finished)
    evaluate(config, finished)
    (scored,) = read_lines(finished / "evaluate.jsonl")
    last = read_lines(finished / "eval.jsonl")[-1]
    assert {k: scored[k] for k in last if k != "step"} == {
        k: v for k, v in last.items() if k != "step"
    }


@pytest.mark.parametrize("stop", [4, 6])  # in the middle of an epoch (3 steps each), and at its end
def test_a_resumed_run_repeats_every_number(folder, finished, stop):
    resumed = run(folder, f"cut{stop}", f"max_steps={stop}")
    run(folder, f"cut{stop}", "resume=true")
    assert (resumed / "eval.jsonl").read_bytes() == (finished / "eval.jsonl").read_bytes()
    losses = [
        [row["train/loss"] for row in read_lines(path / "metrics.jsonl") if row["step"] > 6]
        for path in (resumed, finished)
    ]
    assert losses[0] == losses[1] != []


def test_a_held_out_event_changes_no_weight(folder, finished):
    """Another last event of every user: the same training, bit for bit."""
    table = pq.read_table(folder / "events.parquet").to_pylist()
    last = {}
    for row in table:
        if row["timestamp"] >= last.get(row["user_id"], {"timestamp": -1})["timestamp"]:
            last[row["user_id"]] = row
    for row in last.values():
        row["item_id"] = (row["item_id"] + 1) % NUM_ITEMS
    pq.write_table(pa.Table.from_pylist(table), folder / "other.parquet")
    other = run(folder, "other", f"data.log={folder / 'other.parquet'}")
    losses = [
        [row["train/loss"] for row in read_lines(path / "metrics.jsonl")]
        for path in (other, finished)
    ]
    assert losses[0] == losses[1]
    scores = [json.dumps(read_lines(path / "eval.jsonl")) for path in (other, finished)]
    assert scores[0] != scores[1]


@pytest.mark.gpu
def test_a_gpu_learns_as_a_cpu_does(folder):
    overrides = (
        "loss.retrieval=full_softmax",
        "loss.position_negatives=0",
        "model.hstu.dropout=0",
        "model.encoding.dropout=0",
    )
    rows = [
        read_lines(run(folder, f"on_{device}", *overrides, f"device={device}") / "eval.jsonl")
        for device in ("cpu", "cuda")
    ]
    assert len(rows[0]) == len(rows[1]) == 5
    for a, b in zip(*rows, strict=True):
        assert a["log_pplx"] == pytest.approx(b["log_pplx"], rel=1e-3)


def train_here(config: TrainConfig, resolved) -> None:
    train(config, resolved)


@pytest.mark.slow
def test_two_ranks_learn_and_score_as_one(folder):
    """With negatives that sequences share, which are a function of user and epoch."""
    overrides = (
        "loss.position_negatives=0",
        "data.num_negatives=8",
        "loss.negatives_scope=sequence",
        "embeddings.tables.item.features=[item_id,target_item_id,negative_item_id]",
        "model.hstu.dropout=0",
        "model.encoding.dropout=0",
    )
    one = run(folder, "one", *overrides)
    config = load_config(
        TrainConfig, folder / "run.yaml", (*overrides, f"run_dir={folder / 'two'}")
    )
    run_distributed(train_here, 2, *config)
    rows = [read_lines(path / "eval.jsonl") for path in (one, folder / "two")]
    assert len(rows[0]) == len(rows[1]) == 5
    for a, b in zip(*rows, strict=True):
        assert a["num_examples-retrieval"] == b["num_examples-retrieval"] == NUM_USERS
        assert a["log_pplx"] == pytest.approx(b["log_pplx"], rel=1e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.mode=progressive", "eval.mode must be frozen"),
        ("loss.position_negatives=0", "needs data.num_negatives > 0"),
        ("loss.retrieval=in_batch", "belongs to loss.retrieval=sampled_softmax"),
        ("embeddings.form=auto", "item.dim must be a multiple of 4, got 10"),
        ("data.num_items=31", "set data.num_items=30"),
    ],
)
def test_mistakes_are_one_message(folder, capsys, override, message):
    assert main(["train", str(folder / "run.yaml"), f"run_dir={folder / 'no'}", override]) == 2
    found = capsys.readouterr().err
    assert message in found
    assert not (folder / "no").exists()
