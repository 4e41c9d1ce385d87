"""A run with all of ULTRA-HSTU, served from rows in 4 bits: the answers of the rounded rows."""

import numpy as np
import pytest
import torch

from embeddings.int4 import Int4Table, quantize_int4
from gr import parallel
from gr.evaluate import run_config
from gr.inference.engine import Question, before, load_recommender, load_trainer, recommender_of
from gr.parallel import World
from gr.serve_config import ServeConfig
from tests.e2e.toy import ULTRA
from tests.gr.inference.served import toy_recommender, toy_run

pytestmark = pytest.mark.xdist_group("serve")
TIME = 1_700_600_000


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return toy_run(tmp_path_factory.mktemp("ultra"), *ULTRA)


def answers(recommender):
    """Return task -> the scores of three items for each of four users."""
    questions = []
    for user in range(4):
        history = before(recommender.store.history(user), TIME, recommender.max_events)
        rows = recommender.item_rows(np.array([3, 9, 17]), time=TIME, context=history.context)
        questions.append(Question(user_id=user, time=TIME, history=history, candidates=rows))
    scores: dict[str, list[float]] = {}
    for found in recommender.answer(questions):
        order = np.argsort(found.item_ids)
        for task, values in found.scores.items():
            scores.setdefault(task, []).extend(values[order])
    return {task: np.array(values) for task, values in scores.items()}


def test_answers_are_those_of_the_rounded_rows(run_dir):
    exact = answers(toy_recommender(run_dir))
    served = toy_recommender(run_dir, tables="int4")
    found = answers(served)
    cpu = World(0, 1, torch.device("cpu"))
    trainer, step = load_trainer(run_config(run_dir), str(run_dir), world=cpu)
    for name, table in trainer.config.embeddings.tables.items():
        every = torch.arange(table.num_embeddings)
        rows = trainer.tables.full_weight(name).detach()
        trainer.tables.set_rows(name, every, Int4Table(quantize_int4(rows)).lookup(every))
    rounded = answers(recommender_of(trainer, step))
    for task, values in found.items():
        np.testing.assert_allclose(values, rounded[task], rtol=1e-6, atol=1e-7)
        assert np.abs(values - exact[task]).max() > 1e-5
    # 25 rows of 16 and 5 of 8: half a byte a value, and 4 bytes a row.
    assert served.scorer.lookup.tables.num_bytes == 25 * 12 + 5 * 8


def test_retrieval_compares_with_the_vectors_as_trained(run_dir):
    catalogues = [toy_recommender(run_dir, tables=t).catalogue.vectors_ED for t in ("fp32", "int4")]
    assert torch.equal(*catalogues)


def test_another_form_is_refused(run_dir):
    with pytest.raises(ValueError, match="must be fp32 or int4, got 'int8'"):
        toy_recommender(run_dir, tables="int8")
    with pytest.raises(ValueError, match="--tables must be fp32 or int4"):
        ServeConfig(tables="int2")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["auto", "replicated"])
def test_a_gpu_answers_as_the_cpu(run_dir, form):
    wanted = answers(toy_recommender(run_dir, tables="int4"))
    config = run_config(run_dir, ["device=cuda", f"embeddings.form={form}"])
    world = parallel.start("cuda")
    try:
        found = answers(load_recommender(config, str(run_dir), world=world, tables="int4"))
        for task, values in wanted.items():
            np.testing.assert_allclose(found[task], values, rtol=2e-3, atol=2e-3)
    finally:
        parallel.stop(world)
