"""What a second request of a user costs, against the first: of `gr.inference.bench`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from embeddings.config import EmbeddingsConfig, TableConfig
from embeddings.replicated import ReplicatedTables
from gr.bench_encoders import Shape
from gr.config import EncodingConfig, HeadConfig, TrainConfig
from gr.ids import IdRows
from gr.inference.cache import page_bytes, pages_for
from gr.inference.lookup import TableLookup
from gr.inference.mfalcon import Scorer
from gr.inference.requests import Candidates, Requests
from gr.inference.stack import Stack
from gr.model import SequenceModel, dense_model, feature_dims
from pipelines.config import ActionConfig, DataConfig, TaskConfig

START = 1_650_000_000
NUM_ITEMS = 100_000
Figures = dict[str, float]


def measure_requests(shape: Shape) -> Figures:
    """Row 4: a second request of each of several users against their first."""
    on_gpu = shape.device == "cuda"
    tokens, new, num_candidates, num_users = (8192, 32, 64, 12) if on_gpu else (64, 3, 5, 3)
    together = 32 if on_gpu else 2
    # Two tokens an event.
    config = request_config(shape, tokens)
    torch.manual_seed(0)
    model = dense_model(config, feature_dims(config), 0).to(shape.device).eval()
    assert isinstance(model, SequenceModel)
    device = torch.device(shape.device)
    tables = ReplicatedTables(config.embeddings, device=device, seed=0)
    lookup = TableLookup(model, IdRows(config, tables, "item"), tables)
    stack = Stack(model.encoder, torch.bfloat16 if on_gpu else torch.float32)
    page = page_bytes(stack.shapes, stack.dtype)
    budget = page * (num_users + together + 3) * (pages_for(tokens + 4 * new) + 2)
    scorer = Scorer(config, model, lookup, device, cache_bytes=budget)
    plain = Scorer(config, model, lookup, device, cache_bytes=budget, graphs=False)
    rng = np.random.default_rng(0)
    num_items = config.data.num_items

    def ask(users: list[int], count: int) -> tuple[Requests, Candidates]:
        """Return requests of users who have so many events each."""
        width, B = scorer.encoder.encoder.num_ints, len(users)
        ints = np.zeros((B * count, width), np.int64)
        items = [np.random.default_rng(u).integers(0, num_items, tokens)[:count] for u in users]
        ints[:, 0], ints[:, 1] = np.concatenate(items), np.tile(START + 60 * np.arange(count), B)
        requests = Requests(
            user_id=np.array(users),
            time=np.full(B, START + 60 * count),
            context=np.zeros((B, scorer.encoder.encoder.num_context), np.int64),
            counts=np.full(B, count),
            ints=ints,
            codes=np.ones((B * count, scorer.encoder.encoder.num_codes), np.uint8),
        )
        rows = np.zeros((B * num_candidates, width), np.int64)
        rows[:, 0], rows[:, 1] = rng.integers(0, num_items, len(rows)), requests.time[0]
        floats = np.full((len(rows), scorer.encoder.encoder.num_floats), np.nan, np.float32)
        return requests, Candidates(np.full(B, num_candidates), rows, floats)

    def timed(which: Scorer, users: list[int], count: int) -> tuple[float, int]:
        requests, candidates = ask(users, count)
        _wait()
        start = time.perf_counter()
        history, scores = which.answer(requests, candidates)
        {name: x.cpu() for name, x in scores.ranking.items()}
        return 1e3 * (time.perf_counter() - start), int(history.reused.min())

    half = tokens // 2
    figures: Figures = {}
    groups = [[user] for user in range(num_users)]
    many = [list(range(1000 * i, 1000 * i + together)) for i in range(1, 8 if on_gpu else 4)]
    for name, which, asking in (
        ("", scorer, groups),
        ("_eager", plain, groups),
        ("_together", scorer, many),
    ):
        first, second = [], []
        for users in asking:
            first.append(timed(which, users, half)[0])
            ms, reused = timed(which, users, half + new)
            second.append(ms)
            if reused < tokens - 2:
                raise ValueError(f"the second request reused {reused} tokens of {tokens}")
        skip = max(2, len(asking) // 3)  # these compile and capture
        figures[f"ms_first{name}"] = statistics.median(first[skip:])
        figures[f"ms_second{name}"] = statistics.median(second[skip:])
        if on_gpu:
            others = [user + 10**6 for user in asking[0]]
            for place, count in (("first", half), ("second", half + new)):
                asked = ask(others, count)
                figures[f"ms_{place}{name}_on_device"] = device_ms(partial(which.answer, *asked))
    figures["speedup_together"] = figures["ms_first_together"] / figures["ms_second_together"]
    figures["speedup"] = figures["ms_first"] / figures["ms_second"]
    figures["speedup_of_eager_first"] = figures["ms_first_eager"] / figures["ms_second"]
    return figures


def request_config(shape: Shape, tokens: int) -> TrainConfig:
    """Return a run whose histories can be cached: interleaved, ranking one task."""
    features = ("item_id", "target_item_id", "negative_item_id")
    return TrainConfig(
        run_dir="none",
        precision="bf16" if shape.device == "cuda" else "fp32",
        data=DataConfig(
            log="none",
            max_history_tokens=2 * tokens,
            actions={"click": ActionConfig()},
            tasks={"click": TaskConfig(action="click")},
            num_items=NUM_ITEMS,
            num_negatives=1,
        ),
        embeddings=EmbeddingsConfig(
            tables={
                "item": TableConfig(num_embeddings=NUM_ITEMS + 1, dim=shape.dim, features=features)
            }
        ),
        model=replace(
            shape.hstu(tokens),
            encoding=EncodingConfig(position="from_start", position_buckets=4 * tokens),
            head=HeadConfig(ranking_hidden=(512,)),
        ),
    )


def device_ms(call: Callable[[], object]) -> float:
    """Return how long the kernels and copies of a call take by themselves, ms."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    microseconds: float = sum(x.self_device_time_total for x in profiler.key_averages())
    return microseconds / 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
