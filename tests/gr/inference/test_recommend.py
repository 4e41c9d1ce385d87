"""gr recommend: its scores against those that evaluation adds up, on ranks, across a kill."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from gr import cli
from gr.checkpoint import CheckpointManager
from gr.evaluate import EVALUATE, evaluate, run_config
from gr.inference import recommend as module
from gr.inference.recommend import PROGRESS, recommend
from gr.inference.recommend_users import TopItems, recommend_users
from gr.inference.score_tables import prediction
from gr.parallel import World
from gr.runlog import read_lines
from gr.trainer import EVALUATION, Trainer
from pipelines.config import TaskConfig
from pipelines.stream import SessionStream
from tests.dist import run_distributed
from tests.e2e.toy import events, run, write_config, write_log

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("evaluate")
KEYS = ["user_id", "session_id", "timestamp", "item_id"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of 4 of 9 steps, and its log."""
    folder = tmp_path_factory.mktemp("recommend")
    config = write_config(folder, write_log(folder, users=24))
    return run(config, "max_steps=4", "checkpoint.every_steps=2", "model.hstu.dropout=0.5")


@pytest.fixture(scope="module")
def scores(run_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("scores") / "out"
    argv = ["recommend", str(run_dir), str(output), "--steps-per-file", "4"]
    assert cli.main(argv) == 0
    return output


def read(output, name):
    return pq.read_table(output / name).to_pandas().sort_values(KEYS).reset_index(drop=True)


def test_every_event_has_its_score_once(scores):
    assert [p.name for p in sorted((scores / "ranking").iterdir())] == [
        f"part-{first:08d}-00000.parquet" for first in (0, 4, 8)
    ]
    found = read(scores, "ranking")
    wanted = sorted((e["user_id"], e["timestamp"], e["item_id"]) for e in events(users=24))
    columns = [found[name] for name in ("user_id", "timestamp", "item_id")]
    assert sorted(zip(*columns, strict=True)) == wanted
    clicks = {(e["user_id"], e["timestamp"]): e["click"] for e in events(users=24)}
    for row in found.itertuples():
        assert row.click_label == clicks[row.user_id, row.timestamp]
    progress = json.loads((scores / PROGRESS).read_text())
    assert progress["complete"]
    assert (progress["events"], progress["sessions"]) == (len(wanted), 24 * 3 * 2)


def test_the_scores_are_those_that_evaluation_adds_up(run_dir, scores):
    config = run_config(run_dir)
    trainer = Trainer(config, World(0, 1, torch.device("cpu")), utc_offset=0, sequences_per_step=16)
    trainer.load_learnt(CheckpointManager(run_dir / "checkpoints", apart=(EVALUATION,)), 4)
    outputs = {"click": [], "watch": []}
    ranks, log_probs = [], []
    trainer.evaluation.update_ranking = lambda found, *_: [
        outputs[name].append(x) for name, x in found.items()
    ]
    trainer.evaluation.update_retrieval = lambda rank, log_prob, *_: (
        ranks.append(rank),
        log_probs.append(log_prob),
    )
    for batch in SessionStream(config.data, seed=config.seed):
        trainer.score_step(batch)
    written = pq.read_table(scores / "ranking").to_pandas()
    for name, found in outputs.items():
        ours = written[f"{name}_output"].to_numpy()
        np.testing.assert_allclose(ours, torch.cat(found).numpy(), rtol=0, atol=1e-6)
    retrieval = pq.read_table(scores / "retrieval").to_pandas()
    assert retrieval["rank"].tolist() == torch.cat(ranks).tolist()
    found = torch.cat(log_probs).numpy()
    np.testing.assert_allclose(retrieval["log_prob"].to_numpy(), found, rtol=0, atol=1e-6)


def test_metrics_of_the_files_are_those_of_evaluate(run_dir, scores):
    evaluate(run_config(run_dir), run_dir)
    row = read_lines(run_dir / EVALUATE)[-1]
    ranking, retrieval = read(scores, "ranking"), read(scores, "retrieval")
    label, click = ranking["click_label"], ranking["click"].astype(np.float64)
    assert row["auc-click"] == pytest.approx(roc_auc_score(label, click), rel=1e-5)
    assert row["logloss-click"] == pytest.approx(log_loss(label, click), rel=1e-5)
    # The label of watch is log(1 + seconds), the prediction milliseconds.
    error = ranking["watch"].to_numpy(np.float64) / 1000 - np.expm1(ranking["watch_label"])
    assert row["mae-watch"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert row["num_examples-retrieval"] == len(retrieval)
    assert row["hr@10"] == pytest.approx((retrieval["rank"] <= 10).mean(), rel=1e-5)
    assert row["log_pplx"] == pytest.approx(-retrieval["log_prob"].mean(), rel=1e-5)


def test_a_retrieval_row_names_the_event_that_it_is_of(scores):
    ranking, retrieval = read(scores, "ranking"), read(scores, "retrieval")
    clicked = ranking[ranking["click_label"] > 0]
    have = set(zip(*(clicked[name] for name in KEYS), strict=True))
    rows = list(zip(*(retrieval[name] for name in KEYS), strict=True))
    assert set(rows) <= have
    assert len(have) - 24 <= len(rows) < len(have)  # the first event of a user has no history


def recommend_here(run_dir, output, steps_per_file):
    recommend(run_config(run_dir), run_dir, output, steps_per_file=steps_per_file)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_it_goes_on_from_what_counts(ranks, run_dir, scores, tmp_path, monkeypatch):
    output = tmp_path / "out"

    class KilledError(BaseException):
        pass

    real = module.ScoreFiles.commit

    def killed_before_it_counts(files, progress):
        if progress.position.step > 4:
            raise KilledError
        real(files, progress)

    monkeypatch.setattr(module.ScoreFiles, "commit", killed_before_it_counts)
    with pytest.raises(KilledError):
        recommend_here(str(run_dir), str(output), 2)
    monkeypatch.undo()
    assert json.loads((output / PROGRESS).read_text())["global_step"] == 4
    assert len(list((output / "ranking").iterdir())) == 3  # the third does not count
    # Nor does what a rank wrote that is not there when it goes on.
    third = output / "ranking" / "part-00000004-00000.parquet"
    shutil.copy(third, third.with_name("part-00000004-00003.parquet"))
    if ranks == 1:
        recommend_here(str(run_dir), str(output), 3)
    else:
        run_distributed(recommend_here, ranks, str(run_dir), str(output), 3)
    names = sorted(p.name for p in (output / "ranking").iterdir())
    after = [(first, rank) for first in (4, 7, 10) for rank in range(ranks)]
    assert names == [f"part-{a:08d}-{b:05d}.parquet" for a, b in [(0, 0), (2, 0), *after]]
    for name in ("ranking", "retrieval"):
        ours, theirs = read(output, name), read(scores, name)
        assert ours[KEYS].equals(theirs[KEYS])
        for column in set(ours) - set(KEYS) - {"rank"}:
            np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-5, atol=1e-6)


def messages_of_commands(run_dirs, output):
    """Return what each command says on this rank, which finds a run of its own."""
    run_dir = run_dirs[torch.distributed.get_rank()]
    config = run_config(run_dir)
    commands = (
        lambda: recommend(config, run_dir, output),
        lambda: recommend_users(config, run_dir, output, TopItems(top=2)),
        lambda: evaluate(config, run_dir),
    )
    found = []
    for command in commands:
        with pytest.raises(ValueError) as told:  # noqa: PT011 (the caller reads it)
            command()
        found.append(str(told.value))
    return found


@pytest.mark.slow
def test_ranks_agree_on_the_checkpoint(run_dir, tmp_path):
    """Where one rank finds a newer checkpoint than another, nothing is scored."""
    late = tmp_path / "late"
    shutil.copytree(run_dir, late)
    shutil.rmtree(late / "checkpoints" / "step_4")
    output = tmp_path / "out"
    for texts in run_distributed(messages_of_commands, 2, [str(run_dir), str(late)], str(output)):
        for text in texts:
            assert text.startswith("all ranks must have the same checkpoint, but rank 1 differs")
    assert not output.exists()


def test_what_is_complete_stays_as_it_is(run_dir, scores, capsys):
    before = {p: p.read_bytes() for p in scores.rglob("*") if p.is_file()}
    assert cli.main(["recommend", str(run_dir), str(scores)]) == 0
    assert "is complete: nothing is left to score" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in scores.rglob("*") if p.is_file()} == before


def test_mistakes_are_one_message(run_dir, scores, tmp_path, capsys):
    def fails(*argv):
        assert cli.main(["recommend", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        return err

    (tmp_path / "file").write_text("x")
    assert "is a file" in fails(run_dir, tmp_path / "file")
    assert "holds no scores of gr recommend" in fails(run_dir, tmp_path)
    assert "holds scores of another step: 4 then, 2 now" in fails(run_dir, scores, "--step", "2")
    assert "scores of another overrides" in fails(run_dir, scores, "data.max_history_tokens=8")
    out = tmp_path / "out"
    assert "no such directory" in fails(tmp_path / "absent", out)
    assert "--steps-per-file must be at least 1" in fails(run_dir, out, "--steps-per-file", "0")
    assert not out.exists()


@pytest.mark.parametrize(
    ("task", "outputs", "wanted"),
    [
        (TaskConfig(action="a"), [0.0, 2.0], [0.5, 1 / (1 + np.exp(-2))]),
        (TaskConfig(action="a", type="regression"), [3.0], [3.0]),
        (
            TaskConfig(action="a", type="regression", scale=1000, maximum=60, log1p=True),
            [np.log1p(7.0), 300.0],
            [7000.0, 60_000.0],
        ),
    ],
)
def test_a_prediction_is_in_the_unit_of_the_log(task, outputs, wanted):
    found = prediction(torch.tensor(outputs, dtype=torch.float64), task)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


def test_the_leave_one_out_protocol_is_refused(run_dir, tmp_path):
    config = run_config(run_dir)
    data = replace(config.data, window="day")
    object.__setattr__(data, "window", "epoch")  # its other settings do not matter here
    with pytest.raises(ValueError, match="reads session-end logs"):
        recommend(replace_data(config, data), run_dir, tmp_path / "out")


def replace_data(config, data):
    copy = replace(config)
    object.__setattr__(copy, "data", data)
    return copy
