"""gr export: what is loaded without the sparse stack gives what the model gives."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gr import cli
from gr.exported import AOT, ExportedModel
from gr.inference.engine import Question, before
from tests.e2e.toy import events
from tests.gr.inference.served import toy_recommender, toy_run

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = [pytest.mark.xdist_group("serve"), pytest.mark.slow]
ROOT = Path(__file__).parents[3]
TIME = 1_700_600_000


@pytest.fixture(scope="module")
def run_dir(served_run):
    return served_run


def exported(run_dir, folder, *flags):
    assert cli.main(["export", str(run_dir), str(folder), *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return ExportedModel(folder)


@pytest.fixture(scope="module")
def folder(run_dir, tmp_path_factory):
    return exported(run_dir, tmp_path_factory.mktemp("fp32") / "out", "--tables", "fp32")


def columns_of(user, number=99):
    rows = [e for e in events(users=24) if e["user_id"] == user][-number:]
    names = ("item_id", "timestamp", "click", "watch_ms", "price")
    return {name: [e[name] for e in rows] for name in names}


def asked(recommender, user, items, number=99, retrieve=0):
    history = before(recommender.store.history(user), TIME, min(number, recommender.max_events))
    rows = recommender.item_rows(np.array(items), time=TIME, context=history.context)
    what = {"retrieve": retrieve} if retrieve else {"candidates": rows}
    rank_by = {"retrieval": 1.0} if retrieve else None
    question = Question(user_id=user, time=TIME, history=history, rank_by=rank_by, **what)
    (found,) = recommender.answer([question])
    return found


@pytest.mark.parametrize("number", [99, 2, 1, 0])
@pytest.mark.parametrize("items", [[5], [3, 7, 11, 20]])
def test_it_scores_as_the_model_does(served, model, number, items):
    candidates = {"item_id": items, "price": [float(i % 3) for i in items]}
    history = columns_of(6, number) if number else {}
    scores = model.score(history, TIME, candidates)
    found = asked(served, 6, items, number)
    order = [items.index(i) for i in found.item_ids]
    assert set(scores) == {"click", "watch"}
    for name, values in scores.items():
        np.testing.assert_allclose(values[order], found.scores[name], rtol=1e-4, atol=1e-6)


def test_it_retrieves_as_the_model_does(served, model):
    found = asked(served, 6, [], retrieve=10)
    vector = model.user_vector(columns_of(6), TIME)
    ids, scores = model.retrieve(vector, 10)
    assert ids.tolist() == found.item_ids.tolist()
    np.testing.assert_allclose(scores, found.scores["retrieval"], atol=1e-5)
    rest, _ = model.retrieve(vector, 9, exclude=ids[:2].tolist())
    assert rest[:8].tolist() == ids[2:].tolist()


def test_it_loads_without_the_sparse_stack(folder, tmp_path):
    script = f"""
import json, sys
from gr.exported import ExportedModel
model = ExportedModel({str(folder)!r})
columns = {columns_of(6)!r}
scores = model.score(columns, {TIME}, {{"item_id": [3, 7]}})
heavy = [m for m in sys.modules if m.split(".")[0] in ("torchrec", "fbgemm_gpu")]
ours = [m for m in sys.modules if m in ("gr.trainer", "gr.model", "embeddings.tables")]
print(json.dumps([scores["click"].tolist(), heavy, ours]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    click, heavy, ours = json.loads(done.stdout.splitlines()[-1])
    assert heavy == ours == []
    here = ExportedModel(folder).score(columns_of(6), TIME, {"item_id": [3, 7]})
    assert click == pytest.approx(here["click"].tolist(), abs=1e-6)


@pytest.mark.parametrize(("tables", "tolerance"), [("fp16", 1e-3), ("int8", 2e-2), ("int4", 0.3)])
def test_rounded_tables_hold_the_rounded_rows(run_dir, model, tmp_path, tables, tolerance):
    small = exported(run_dir, tmp_path / "small", "--tables", tables)
    rounded, whole = ExportedModel(small), model
    assert rounded.num_bytes < whole.num_bytes
    for name, table in rounded.tables.items():
        every = torch.arange(len(table.rows))
        got, exact = table.lookup(every), whole.tables[name].rows
        if tables == "fp16":
            assert torch.equal(got, exact.half().float())
        # Half a step of (largest - least) / levels, and what float16 constants round.
        levels = {"int8": 255, "int4": 15}.get(tables)
        if levels:
            spread = exact.amax(1) - exact.amin(1)
            bound = spread / levels * 0.51 + exact.abs().amax(1) * 2e-3
            assert ((got - exact).abs().amax(1) <= bound).all()
    score = rounded.score(columns_of(6), TIME, {"item_id": [3, 7, 9]})
    exact = whole.score(columns_of(6), TIME, {"item_id": [3, 7, 9]})
    assert 0 < np.abs(score["click"] - exact["click"]).max() < tolerance


def test_compiled_ahead_of_time_it_gives_the_same(run_dir, folder, tmp_path):
    compiled = exported(run_dir, tmp_path / "aot", "--tables", "fp32", "--aot")
    assert (compiled / AOT).is_file()
    candidates = {"item_id": list(range(24))}
    for number in (99, 2):
        ours = ExportedModel(compiled, aot=True).score(columns_of(6, number), TIME, candidates)
        theirs = ExportedModel(folder).score(columns_of(6, number), TIME, candidates)
        for name, values in ours.items():
            np.testing.assert_allclose(values, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.layout=merged", "data.anchor=session", "model.encoding.candidate_action=learned"),
        ("model.encoder=transformer", "model.head.retrieval=false"),
        ("embeddings.tables.price.ids=hashed",),
    ],
    ids=["merged", "transformer without retrieval", "hashed"],
)
def test_other_models(overrides, tmp_path):
    run_dir = toy_run(tmp_path, *overrides)
    model = ExportedModel(exported(run_dir, tmp_path / "out", "--tables", "fp32"))
    found = asked(toy_recommender(run_dir), 6, [3, 7, 11])
    scores = model.score(
        columns_of(6),
        TIME,
        {"item_id": found.item_ids.tolist(), "price": [float(i % 3) for i in found.item_ids]},
    )
    for name, values in scores.items():
        np.testing.assert_allclose(values, found.scores[name], rtol=1e-4, atol=1e-6)
    if "model.head.retrieval=false" in overrides:
        with pytest.raises(ValueError, match="no retrieval head"):
            model.user_vector(columns_of(6), TIME)


def test_what_is_wrong_is_told(run_dir, folder, model, tmp_path, capsys):
    def fails(*argv):
        assert cli.main(["export", str(run_dir), *map(str, argv)]) == 2
        return capsys.readouterr().err

    assert "is there and not empty" in fails(folder)
    assert "--tables must be fp32" in fails(tmp_path / "out", "--tables", "fp64")
    assert "no complete checkpoint of step 3" in fails(tmp_path / "out", "--step", "3")
    with pytest.raises(ValueError, match="is no exported model"):
        ExportedModel(tmp_path)
    with pytest.raises(ValueError, match="run gr export with --aot"):
        ExportedModel(folder, aot=True)
    for history, candidates, message in [
        (columns_of(6), {"item_id": [24]}, "expected ids in 0 .. 23"),
        (columns_of(6), {"item_id": []}, "candidates must not be empty"),
        (columns_of(6) | {"item_id": [1]}, {"item_id": [1]}, "must have 1 values, got"),
        (columns_of(6) | {"click": ["x"] * 24}, {"item_id": [1]}, "'click' must hold number"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.score(history, TIME, candidates)
    with pytest.raises(ValueError, match="the history is empty"):
        model.user_vector(columns_of(6), 5)


def test_another_format_is_refused(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        ExportedModel(tmp_path)
