"""The embedding of an item = its row + a function of its content, wherever it stands."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gr.cold_start import ContentTower, vectors_key
from gr.config import ColdStartConfig, LossConfig, PretrainedConfig
from gr.parallel import World
from gr.trainer import Trainer
from pipelines.config import ITEM_ID, NEGATIVE_ITEM_ID, TARGET_ITEM_ID
from tests.gr.batches import DIM, NUM_ITEMS, batches, data_config, random_log, train_config

MODE = ("interleaved", "event", "session", "none")
WITH_CONTENT = 30
"""Items 0 .. 29 have content, the others not."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("content")
    vectors = np.random.default_rng(0).normal(size=(WITH_CONTENT, 5)).astype(np.float32)
    np.save(folder / "content.npy", vectors)
    content = ColdStartConfig(path=str(folder / "content.npy"), hidden=(7,))
    data = data_config(random_log(folder / "log"), MODE, num_negatives=4)
    return train_config(data, cold_start=content)


def by_hand(tower: ContentTower, item: int) -> np.ndarray:
    """f of one item, in fp64."""
    if not 0 <= item < WITH_CONTENT:
        return tower.missing_D.detach().double().numpy()
    v = np.load(tower.path)[item].astype(np.float64)
    v = (v - v.mean()) / np.sqrt(v.var() + 1e-5)
    linear = tower.hidden[0]
    h = linear.weight.detach().double().numpy() @ v + linear.bias.detach().double().numpy()
    return tower.readout.weight.detach().double().numpy() @ (h / (1 + np.exp(-h)))


def make_trainer(config) -> Trainer:
    world = World(0, 1, torch.device("cpu"))
    trainer = Trainer(config, world, utc_offset=0, sequences_per_step=10)
    trainer.evaluation.roll(0)
    return trainer


@pytest.mark.parametrize("with_rows", [True, False])
def test_every_place_of_an_item_has_its_content(config, monkeypatch, with_rows):
    content = replace(config.model.cold_start, with_rows=with_rows)
    config = replace(config, model=replace(config.model, cold_start=content))
    trainer = make_trainer(config)
    tower, weight = trainer.model.content, trainer.tables.weights["item"].detach().clone()
    batch = batches(config.data)[0]
    raw = {name: batch.ids[name].values().clone() for name in batch.ids.keys()}  # noqa: SIM118
    seen = {}
    forward = trainer.model.tokens.forward
    monkeypatch.setattr(
        trainer.model.tokens, "forward", lambda b, rows: seen.update(rows) or forward(b, rows)
    )
    objective = trainer.objective.forward

    def keep(batch, predictions, *args):
        seen.update({f"loss {name}": x for name, x in predictions.rows.items()})
        return objective(batch, predictions, *args)

    monkeypatch.setattr(trainer.objective, "forward", keep)
    ranked = {}
    monkeypatch.setattr(
        "gr.scoring.catalogue_ranks",
        lambda users, targets, rows, chunks, **_: (
            ranked.update(targets=targets, items=dict(chunks)) or (rows, users.sum(1))
        ),
    )
    trainer.train_step(batch)

    def expected(ids) -> torch.Tensor:
        rows = weight.double().numpy() * with_rows
        whole = [rows[x + 1] + by_hand(tower_before, x) for x in ids.tolist()]
        return torch.tensor(np.array(whole)).float()

    # The step has moved the tower: compare with what it was.
    tower_before = make_trainer(config).model.content
    for name in (ITEM_ID, TARGET_ITEM_ID, NEGATIVE_ITEM_ID):
        assert len(raw[name]) > 5
        torch.testing.assert_close(seen[f"loss {name}"].detach(), expected(raw[name]))
    torch.testing.assert_close(seen[ITEM_ID].detach(), expected(raw[ITEM_ID]))
    normed = torch.nn.functional.normalize(expected(raw[TARGET_ITEM_ID]))
    torch.testing.assert_close(ranked["targets"].detach(), normed)
    catalogue = torch.nn.functional.normalize(expected(torch.arange(-1, NUM_ITEMS)))
    torch.testing.assert_close(ranked["items"][0].detach(), catalogue)
    for after, before in zip(tower.parameters(), tower_before.parameters(), strict=True):
        assert not torch.equal(after, before)
    assert torch.equal(trainer.tables.weights["item"].detach(), weight) != with_rows


def test_items_without_content_are_counted(config):
    trainer = make_trainer(config)
    batch = batches(config.data)[0]
    found, lacking = trainer.model.find_vectors(batch)
    ids = batch.ids[ITEM_ID].values()
    assert found[vectors_key(ITEM_ID)].tolist() == [
        x if 0 <= x < WITH_CONTENT else -1 for x in ids.tolist()
    ]
    first = batch.session_start
    new = sum(
        1
        for b in range(batch.num_sequences)
        for i, x in enumerate(batch.ids[ITEM_ID].to_dense()[b].tolist())
        if 2 * i >= first[b] and not 0 <= x < WITH_CONTENT
    )
    assert lacking["cold_start"] == new > 0
    trainer.train_step(batch)
    assert trainer.skipped_by_name()["data/without_vector/cold_start"] == new


def test_settings_that_content_cannot_go_with_are_refused(config):
    def changed(table=None, **model):
        tables = dict(config.embeddings.tables)
        tables["item"] = replace(tables["item"], **(table or {}))
        return replace(
            config,
            model=replace(config.model, **model),
            embeddings=replace(config.embeddings, tables=tables),
        )

    with pytest.raises(ValueError, match="use static or dynamic"):
        changed({"ids": "hashed"})
    with pytest.raises(ValueError, match="trains rows only"):
        replace(config, loss=LossConfig(retrieval="full_softmax"))
    no_negatives = replace(config.data, num_negatives=0)
    with pytest.raises(ValueError, match="position_negatives=3 trains rows only"):
        replace(config, data=no_negatives, loss=LossConfig(position_negatives=3))
    with pytest.raises(ValueError, match=r"model\.cold_start has no path"):
        changed(cold_start=ColdStartConfig(hidden=(3,)))
    frozen = PretrainedConfig(feature=ITEM_ID, path=config.model.cold_start.path)
    with pytest.raises(ValueError, match=r"pretrained\.cold_start"):
        changed(pretrained={"cold_start": frozen})
    with pytest.raises(ValueError, match=r"model\.cold_start\.path=.*no such file"):
        ContentTower(ColdStartConfig(path="nowhere.npy"), DIM)
