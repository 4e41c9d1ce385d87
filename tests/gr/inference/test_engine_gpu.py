"""Questions answered on a GPU: what the CPU answers, with sharded tables and replicated ones."""

import numpy as np
import pytest

from gr import parallel
from gr.evaluate import run_config
from gr.inference.engine import Question, before, load_recommender
from gr.inference.user_store import UserHistory
from tests.gr.inference.served import toy_recommender, toy_run

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


@pytest.mark.parametrize("form", ["sharded", "replicated"])
def test_what_cached_users_ask_next_is_a_graph_of_either_form(form, tmp_path):
    run_dir = toy_run(tmp_path, "model.encoding.position=from_start")
    cpu = toy_recommender(run_dir)
    config = run_config(run_dir, ["device=cuda", f"embeddings.form={form}"])
    world = parallel.start("cuda")
    try:
        gpu = load_recommender(config, str(run_dir), world=world, cache_bytes=20_000_000)
        assert gpu.scorer.next is not None
        whole = cpu.store.history(5)
        for number in (5, 6, 7, 8, 11):
            history = UserHistory(whole.ints[:number], whole.codes[:number], whole.context)
            time = int(history.ints[-1, 1]) + 1
            rows = cpu.item_rows(np.array([3, 7, 11]), time=time, context=whole.context)
            question = Question(user_id=5, time=time, history=history, candidates=rows)
            (wanted,), (found,) = cpu.answer([question]), gpu.answer([question])
            order = [found.item_ids.tolist().index(i) for i in wanted.item_ids]
            for name, values in wanted.scores.items():
                np.testing.assert_allclose(found.scores[name][order], values, rtol=2e-3, atol=2e-3)
            assert (found.reused_tokens > 0) == (number > 5)
        assert gpu.scorer.next._graphs
    finally:
        parallel.stop(world)
