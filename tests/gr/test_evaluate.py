"""gr evaluate: against the model scored by hand, on its own log and on another, and its errors."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from gr import cli
from gr.checkpoint import CheckpointManager
from gr.evaluate import EVALUATE, evaluate, run_config
from gr.parallel import World
from gr.runlog import read_lines
from gr.sequence import sequence_info
from gr.trainer import EVALUATION, Trainer
from pipelines.stream import SessionStream
from tests.dist import run_distributed
from tests.e2e.toy import run, write_config, write_log

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("evaluate")

COUNTS = ("num_examples-click", "num_examples-watch", "num_examples-retrieval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of 6 of 9 steps with dropout, its log, and another log."""
    folder = tmp_path_factory.mktemp("evaluate")
    log = write_log(folder, users=24)
    (folder / "other").mkdir()
    write_log(folder / "other", users=8, days=1, seed=7)
    config = write_config(folder, log)
    run(config, "max_steps=6", "checkpoint.every_steps=3", "model.hstu.dropout=0.5")
    return folder


@pytest.fixture
def run_dir(folder, tmp_path):
    """A copy of the run, under another name than it was written with."""
    return Path(shutil.copytree(folder / "run", tmp_path / "moved"))


def bytes_of(run_dir):
    files = sorted(p for p in run_dir.rglob("*") if p.is_file() and p.name != EVALUATE)
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in files}


def by_hand(run_dir, config, step):
    """Return labels, probabilities of click and ranks of all targets, one sequence at a time."""
    world = World(0, 1, torch.device("cpu"))
    trainer = Trainer(config, world, utc_offset=0, sequences_per_step=8 * 4)
    checkpoints = CheckpointManager(run_dir / "checkpoints", apart=(EVALUATION,))
    dense = checkpoints.read(step, "dense")
    trainer.model.load_state_dict(dense)
    for name, weight in trainer.tables.weights.items():
        weight.data = checkpoints.read(step, f"tables.tables.{name}")["weight"]
    model = trainer.model.eval()
    items = torch.nn.functional.normalize(trainer.tables.weights["item"].detach(), dim=1)
    labels, probabilities, ranks = [], [], []
    for batch in SessionStream(config.data, seed=config.seed):
        batch.ids = trainer.id_rows.vocabulary.rows(batch.ids)
        with torch.no_grad():
            rows = trainer.tables.lookup(batch.ids)
            predictions = model(batch, sequence_info(batch), rows)
        known = batch.weights["click"] > 0
        labels += batch.labels["click"][known].tolist()
        probabilities += predictions.ranking["click"][known].double().sigmoid().tolist()
        targets = batch.ids["target_item_id"].values().tolist()
        for user, target in zip(predictions.user_vectors, targets, strict=True):
            scores = (items @ user)[1:]
            ranks.append(1 + int((scores > scores[target - 1]).sum()))
    return labels, probabilities, ranks


@pytest.mark.parametrize("step", [None, 3])
def test_it_scores_what_the_checkpoint_says(run_dir, folder, step, capsys):
    before = bytes_of(run_dir)
    other = folder / "other" / "log"
    argv = ["evaluate", str(run_dir), f"data.log={other}", *(["--step", "3"] if step else [])]
    assert cli.main(argv) == 0
    assert bytes_of(run_dir) == before  # nothing learnt, nothing else written
    rows = read_lines(run_dir / EVALUATE)
    assert [row["window"] for row in rows] == ["2023-11-15", "all"]
    assert {row["step"] for row in rows} == {step or 6}
    assert {row["log"] for row in rows} == {str(other)}
    assert {row["overrides"] for row in rows} == {f"data.log={other}"}
    config = run_config(run_dir, [f"data.log={other}"])
    labels, probabilities, ranks = by_hand(run_dir, config, step or 6)
    assert len(labels) == 8 * 2 * 4
    assert len(ranks) > 10
    for row in rows:
        assert row["num_examples-click"] == len(labels)
        assert row["num_examples-retrieval"] == len(ranks)
        assert row["logloss-click"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
        assert row["auc-click"] == pytest.approx(roc_auc_score(labels, probabilities), rel=1e-6)
        assert row["hr@10"] == pytest.approx(np.mean(np.array(ranks) <= 10), rel=1e-6)
        assert row["mrr"] == pytest.approx(np.mean(1 / np.array(ranks)), rel=1e-6)
    err = capsys.readouterr().err
    assert "evaluate 2023-11-15  ne-click" in err
    assert "evaluate all  ne-click" in err


def test_the_log_of_the_run_has_the_same_examples_and_other_scores(run_dir):
    assert cli.main(["evaluate", str(run_dir)]) == 0
    rows = read_lines(run_dir / EVALUATE)
    first, progressive = rows[0], read_lines(run_dir / "eval.jsonl")[0]
    # The run ended in its second day: the first is whole.
    assert first["window"] == progressive["window"]
    assert {k: first[k] for k in COUNTS} == {k: progressive[k] for k in COUNTS}
    assert first["ne-click"] != progressive["ne-click"]
    assert len(rows) == 4
    assert rows[-1]["num_examples-click"] == 24 * 3 * 2 * 4
    again = (run_dir / EVALUATE).read_bytes()
    assert cli.main(["evaluate", str(run_dir)]) == 0
    assert (run_dir / EVALUATE).read_bytes() == again


def test_the_cut_offs_may_be_others(run_dir):
    argv = ["evaluate", str(run_dir), "eval.ks=[3]", "eval.filter_seen=true", "data.window=none"]
    assert cli.main(argv) == 0
    (row,) = read_lines(run_dir / EVALUATE)
    assert row["window"] == "all"
    assert 0 < row["hr@3"] < 1
    assert "hr@10" not in row


def test_whatever_trains_each_session_is_scored_once(run_dir):
    found = {}
    for supervise in ("session", "sampled"):
        argv = ["evaluate", str(run_dir), f"data.supervise={supervise}", "data.window=none"]
        argv += ["model.encoding.position=from_start", "model.encoding.time=none"]
        argv += ["data.sampled_rate=0.3"] if supervise == "sampled" else []
        assert cli.main(argv) == 0
        (found[supervise],) = read_lines(run_dir / EVALUATE)
        found[supervise].pop("overrides")
    assert found["sampled"] == found["session"]
    assert found["session"]["num_examples-click"] == 24 * 3 * 2 * 4


def evaluate_here(run_dir):
    evaluate(run_config(run_dir), run_dir)


def test_two_ranks_score_as_one(run_dir):
    evaluate_here(run_dir)
    one = read_lines(run_dir / EVALUATE)
    (run_dir / EVALUATE).unlink()
    run_distributed(evaluate_here, 2, str(run_dir))
    two = read_lines(run_dir / EVALUATE)
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


def test_what_is_skipped_is_counted(run_dir, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = run_config(run_dir)
    log = Path(shutil.copytree(config.data.log, tmp_path / "spoilt"))
    part = next(p for p in sorted(log.glob("part-*.parquet")) if pq.read_table(p).num_rows > 2)
    table = pq.read_table(part)
    users = [None, *table["user_id"].to_pylist()[1:]]
    column = pa.array(users, table.schema.field("user_id").type)
    index = table.schema.get_field_index("user_id")
    pq.write_table(table.set_column(index, table.schema.field("user_id"), column), part)
    argv = ["evaluate", str(run_dir), f"data.log={log}", "data.max_reject_fraction=0.5"]
    assert cli.main(argv) == 0
    (*_, last) = read_lines(run_dir / EVALUATE)
    skipped = {k: v for k, v in last.items() if k.startswith("data/rejected/")}
    assert skipped == {"data/rejected/null user_id, session_id, start_ts or end_ts": 1}
    assert last["num_examples-click"] == (24 * 3 * 2 - 1) * 4


def test_mistakes_are_one_message_and_leave_no_file(run_dir, tmp_path, capsys):
    def fails(*argv):
        assert cli.main(["evaluate", *argv]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert not (run_dir / EVALUATE).exists()
        return err

    run_dir_text = str(run_dir)
    assert "no such directory" in fails(str(tmp_path / "absent"))
    assert "no config.yaml in it" in fails(str(tmp_path))
    assert "absent" in fails(run_dir_text, f"data.log={tmp_path}/absent")
    assert "a checkpoint of another model" in fails(run_dir_text, "model.num_layers=3")
    assert "Did you mean model" in fails(run_dir_text, "modle.dim=3")
    err = fails(run_dir_text, "--step", "4")
    assert "no complete checkpoint of step 4, but of [3, 6]" in err
    shutil.rmtree(run_dir / "checkpoints")
    assert "holds no complete checkpoint, so there is nothing to evaluate" in fails(run_dir_text)


def test_numbers_that_are_not_defined_are_null(run_dir, folder):
    other = folder / "other" / "log"
    argv = ["evaluate", str(run_dir), f"data.log={other}", "eval.lifetime_auc=false"]
    assert cli.main(argv) == 0
    rows = read_lines(run_dir / EVALUATE)
    assert rows[-1]["auc-click"] is None
    assert math.isfinite(rows[0]["auc-click"])
