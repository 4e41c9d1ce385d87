"""gr recommend --top: every user's items are those that the engine gives, also after a kill."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr import cli
from gr.evaluate import run_config
from gr.inference import recommend_users as module
from gr.inference.engine import Question, before
from gr.inference.recommend_users import TopItems, recommend_users
from tests.dist import run_distributed

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("serve")


def here(run_dir, output):
    what = TopItems(top=3, retrieve=6, exclude_seen=True)
    recommend_users(run_config(run_dir), run_dir, output, what, users_per_file=7)


def rows_of(output):
    table = pq.read_table(output / "top").to_pandas()
    return table.sort_values(["user_id", "place"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def written(served_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("top") / "out"
    here(str(served_run), str(output))
    return output


def test_each_user_has_what_the_engine_finds(served, written):
    assert len(list((written / "top").iterdir())) == 4  # 24 users, 7 a file
    table = rows_of(written)
    newest = max(served.store.history(u).ints[-1, 1] for u in range(24))
    assert table["user_id"].nunique() == 24
    for user, rows in table.groupby("user_id"):
        history = before(served.store.history(user), newest + 1, served.max_events)
        question = Question(
            user_id=user,
            time=int(newest) + 1,
            history=history,
            retrieve=6,
            exclude=history.ints[:, 0],
            top=3,
        )
        (found,) = served.answer([question])
        assert rows["item_id"].tolist() == found.item_ids.tolist()
        assert rows["place"].tolist() == [1, 2, 3]
        for name, values in found.scores.items():
            np.testing.assert_allclose(rows[name], values, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows["order"], found.order, rtol=1e-5)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_it_goes_on(ranks, served_run, written, tmp_path, monkeypatch):
    real = module.pq.write_table

    def killed(table, path, **options):
        if "000002" in path.name:
            raise KeyboardInterrupt
        real(table, path, **options)

    monkeypatch.setattr(module.pq, "write_table", killed)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        here(str(served_run), str(output))
    monkeypatch.undo()
    kept = {p: p.stat().st_mtime_ns for p in (output / "top").iterdir()}
    assert len(kept) == 2
    if ranks == 1:
        here(str(served_run), str(output))
    else:
        run_distributed(here, ranks, str(served_run), str(output))
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    ours, theirs = rows_of(output), rows_of(written)
    assert ours["item_id"].tolist() == theirs["item_id"].tolist()


def test_mistakes_are_one_message(served_run, written, tmp_path, capsys):
    def fails(*argv):
        assert cli.main(["recommend", str(served_run), *map(str, argv)]) == 2
        return capsys.readouterr().err

    assert "--top must be within 1 and --retrieve=5" in fails(
        tmp_path / "a", "--top", "6", "--retrieve", "5"
    )
    assert "are of --top" in fails(tmp_path / "a", "--exclude-seen")
    assert "recommendations of another time" in fails(written, "--top", "3", "--time", "5")
    (tmp_path / "x").write_text("x")
    assert "holds nothing of gr recommend" in fails(tmp_path, "--top", "3")
