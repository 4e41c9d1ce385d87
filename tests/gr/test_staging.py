"""What looking ahead must not change: order, position, and what comes before an error."""

import pytest
import torch

from embeddings.tables import PendingLookup
from gr.parallel import World
from gr.staging import Ahead, StagedBatch
from gr.trainer import Trainer
from tests.gr.batches import batches, data_config, random_log, train_config

MODE = ("interleaved", "event", "session", "none")


class Lookup(PendingLookup):
    """Records how far it was brought."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        log.append(f"send {name}")

    def advance(self) -> None:
        self.log.append(f"advance {self.name}")


def staged(log: list[str]):
    return lambda name: StagedBatch(name, None, Lookup(name, log), None, None)


@pytest.mark.parametrize("looks_ahead", [True, False])
def test_batches_come_in_order_and_once(looks_ahead):
    log: list[str] = []
    ahead = Ahead(iter("abc"), staged(log))
    for each in ahead:
        if looks_ahead:
            ahead.fetch()
            ahead.advance()
        log.append(f"train {each.batch}")
    trained = [line for line in log if line.startswith("train")]
    assert trained == ["train a", "train b", "train c"]
    expected = ["send a", "send b", "advance b", "train a", "send c", "advance c", "train b"]
    if not looks_ahead:
        expected = ["send a", "train a", "send b", "train b", "send c"]
    assert log == [*expected, "train c"]


def test_what_a_batch_raises_comes_in_its_place():
    def stream():
        yield "a"
        raise ValueError("too many rejects")

    log: list[str] = []
    ahead = Ahead(stream(), staged(log))
    each_one = iter(ahead)
    first = next(each_one)
    ahead.fetch()
    ahead.advance()
    log.append(f"train {first.batch}")
    with pytest.raises(ValueError, match="too many rejects"):
        next(each_one)
    assert log == ["send a", "train a"]


def test_the_position_is_that_of_the_last_batch_that_trained(tmp_path):
    config = train_config(data_config(random_log(tmp_path / "log"), MODE))
    trainer = Trainer(
        config, World(0, 1, torch.device("cpu")), utc_offset=0, sequences_per_step=8 * 2
    )
    trainer.evaluation.roll(0)
    steps = batches(config.data)[:3]
    pulled = []

    def watched():
        for batch in steps:
            pulled.append((trainer.next_step, batch.position.step))
            yield batch

    ahead = trainer.ahead(watched())
    for each in ahead:
        trainer.train_step(each, ahead)
        assert trainer.progress.position == each.batch.position
    assert len(pulled) == 3
    assert [step for step, _ in pulled] == [position for _, position in pulled]
