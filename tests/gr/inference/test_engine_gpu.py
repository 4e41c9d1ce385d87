"""Questions answered on a GPU: what the CPU answers, with sharded tables and replicated ones."""

import numpy as np
import pytest

from gr import parallel
from gr.evaluate import run_config
from gr.inference.engine import Question, before, load_recommender
from tests.gr.inference.served import toy_recommender

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("serve")]
TIME = 1_700_600_000


def questions(recommender):
    made = []
    for user in range(6):
        history = before(recommender.store.history(user), TIME, recommender.max_events)
        asked = {"user_id": user, "time": TIME, "history": history}
        rows = recommender.item_rows(np.array([3, 9, 17]), time=TIME, context=history.context)
        made.append(Question(**asked, candidates=rows))
        made.append(Question(**asked, retrieve=8, rank_by={"retrieval": 1.0}))
    return made


@pytest.mark.parametrize("form", ["auto", "replicated"])
@pytest.mark.parametrize("cache_bytes", [0, 20_000_000])
def test_a_gpu_answers_as_the_cpu(served_run, form, cache_bytes):
    cpu = toy_recommender(served_run)
    config = run_config(served_run, ["device=cuda", f"embeddings.form={form}"])
    world = parallel.start("cuda")
    try:
        gpu = load_recommender(config, str(served_run), world=world, cache_bytes=cache_bytes)
        wanted = cpu.answer(questions(cpu))
        for together in (True, False):
            asked = questions(gpu)
            found = gpu.answer(asked) if together else [gpu.answer([q])[0] for q in asked]
            for mine, theirs in zip(found, wanted, strict=True):
                assert set(mine.item_ids) == set(theirs.item_ids)
                order = [mine.item_ids.tolist().index(i) for i in theirs.item_ids]
                for name, values in theirs.scores.items():
                    np.testing.assert_allclose(
                        mine.scores[name][order], values, rtol=2e-3, atol=2e-3
                    )
    finally:
        parallel.stop(world)
