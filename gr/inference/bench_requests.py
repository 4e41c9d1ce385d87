"""What a second request of a user costs, against the first: of `gr.inference.bench`."""

import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from embeddings.config import EmbeddingsConfig, TableConfig
from gr.bench_encoders import Shape
from gr.config import EncodingConfig, HeadConfig, TrainConfig
from gr.inference.cache import page_bytes, pages_for
from gr.inference.mfalcon import Scorer
from gr.inference.requests import Candidates, Requests
from gr.inference.stack import Stack
from gr.model import SequenceModel, dense_model, feature_dims
from pipelines.batch import SequenceBatch
from pipelines.config import ActionConfig, DataConfig, TaskConfig

START = 1_650_000_000
Figures = dict[str, float]


def measure_requests(shape: Shape) -> Figures:
    """Row 4: a second request of each of several users against their first."""
    on_gpu = shape.device == "cuda"
    tokens, new, num_candidates, num_users = (8192, 32, 64, 12) if on_gpu else (64, 3, 5, 2)
    # Two tokens an event.
    config = request_config(shape, tokens)
    torch.manual_seed(0)
    model = dense_model(config, feature_dims(config), 0).to(shape.device)
    assert isinstance(model, SequenceModel)
    table = torch.randn(1_000_001 if on_gpu else 1001, shape.dim, device=shape.device) * 0.02
    device = torch.device(shape.device)

    def lookup(batch: SequenceBatch) -> tuple[SequenceBatch, dict[str, Tensor]]:
        batch = batch.to(device, non_blocking=True)
        rows = table.index_select(0, batch.ids.values() + 1)
        parts = torch.split(rows, batch.ids.length_per_key())
        return batch, dict(zip(batch.ids.keys(), parts, strict=True))

    stack = Stack(model.encoder, torch.bfloat16 if on_gpu else torch.float32)
    page = page_bytes(stack.shapes, stack.dtype)
    budget = page * (num_users + 3) * (pages_for(tokens + 4 * new) + 2)
    scorer = Scorer(config, model, lookup, device, cache_bytes=budget)
    plain = Scorer(config, model, lookup, device, cache_bytes=budget, graphs=False)
    rng = np.random.default_rng(0)
    num_items = len(table) - 1

    def events(user: int, count: int) -> tuple[Requests, Candidates]:
        of_user = np.random.default_rng(user)
        ints = np.zeros((count, scorer.encoder.encoder.num_ints), np.int64)
        ints[:, 0] = of_user.integers(0, num_items, tokens)[:count]
        ints[:, 1] = START + 60 * np.arange(count)
        codes = np.ones((count, scorer.encoder.encoder.num_codes), np.uint8)
        requests = Requests(
            user_id=np.array([user]),
            time=np.array([START + 60 * count]),
            context=np.zeros((1, scorer.encoder.encoder.num_context), np.int64),
            counts=np.array([count]),
            ints=ints,
            codes=codes,
        )
        items = np.zeros((num_candidates, scorer.encoder.encoder.num_ints), np.int64)
        items[:, 0] = rng.integers(0, num_items, num_candidates)
        items[:, 1] = requests.time[0]
        floats = np.full((num_candidates, scorer.encoder.encoder.num_floats), np.nan, np.float32)
        return requests, Candidates(np.array([num_candidates]), items, floats)

    def timed(which: Scorer, user: int, count: int) -> tuple[float, int]:
        requests, candidates = events(user, count)
        _wait()
        start = time.perf_counter()
        history, _ = which.answer(requests, candidates)
        _wait()
        return 1e3 * (time.perf_counter() - start), int(history.reused[0])

    half = tokens // 2
    figures: Figures = {}
    for name, which in (("", scorer), ("_eager", plain)):
        first, second = [], []
        for user in range(num_users):
            first.append(timed(which, user, half)[0])
            ms, reused = timed(which, user, half + new)
            second.append(ms)
            if reused < tokens - 2:
                raise ValueError(f"the second request reused {reused} tokens of {tokens}")
        skip = num_users // 3  # compiles and captures
        figures[f"ms_first{name}"] = statistics.median(first[skip:])
        figures[f"ms_second{name}"] = statistics.median(second[skip:])
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
            num_items=1000,
            num_negatives=1,
        ),
        embeddings=EmbeddingsConfig(
            tables={"item": TableConfig(num_embeddings=1001, dim=shape.dim, features=features)}
        ),
        model=replace(
            shape.hstu(tokens),
            encoding=EncodingConfig(position="from_start", position_buckets=4 * tokens),
            head=HeadConfig(ranking_hidden=(512,)),
        ),
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
