"""Drawn runs and requests, and what the training code says about each candidate by itself."""

import atexit
import random
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from embeddings.vocabulary import Vocabulary
from gr.cold_start import vectors_key
from gr.config import (
    ColdStartConfig,
    EncodingConfig,
    GroupConfig,
    HeadConfig,
    HSTUConfig,
    PretrainedConfig,
    RotaryConfig,
    SemiLocalConfig,
    TransformerConfig,
    TruncationConfig,
)
from gr.hstu import kept_history
from gr.inference import RequestEncoder, Scorer
from gr.inference.cache import page_bytes
from gr.mixture import mixture_groups
from gr.model import dense_model, feature_dims
from gr.sequence import sequence_info
from pipelines.assemble import assemble
from pipelines.batch import StreamPosition
from pipelines.config import NEGATIVE_ITEM_ID
from pipelines.features import EventEncoder
from pipelines.gather import Gathered
from pipelines.history import FIRST_CONTEXT
from tests.gr.batches import NUM_ITEMS, data_config, make_tables, train_config
from tests.pipelines.logs import MERGED_MODES, MODES, RICH

START = 1_650_000_000


@st.composite
def runs(draw, *, stable=False):
    """Return the configuration of a run, in every respect that a score depends on."""
    mode = draw(st.sampled_from(MODES + MERGED_MODES))
    _, anchor, supervise, context = mode
    by_session = supervise == "session" and not stable
    features = draw(st.sampled_from([{}, RICH])) if context != "none" else {}
    data = data_config(
        "none",
        mode,
        positive=(),
        max_history_tokens=14,
        action_context=draw(st.sampled_from([(), (), ("tab",), ("price_bin", "tab")])),
        **features,
    )
    vectors = draw(st.sampled_from(["none", "none", "pretrained", "cold_start"]))
    encoder = draw(st.sampled_from(["hstu"] * 4 + ["sasrec", "transformer", "cross_attention"]))
    mixture = {}
    if by_session and draw(st.booleans()):
        mixture = {
            "newest": GroupConfig(history=2),
            "engaged": GroupConfig(actions={"click": 0.5, "watch": 3.0}),
        }
    window = draw(st.sampled_from([0, 2, 5]))
    rows = draw(st.sampled_from([0, 3])) if window and anchor == "session" and not stable else 0
    truncation = TruncationConfig()
    if by_session and draw(st.booleans()):
        truncation = TruncationConfig(
            layers=draw(st.integers(1, 2)), history=draw(st.integers(1, 9))
        )
    positions = ["none", "from_start"]
    if by_session:
        positions += ["from_session"] + ["from_end"] * (anchor == "session")
    hstu = HSTUConfig(
        num_heads=2,
        qk_dim=4,
        v_dim=draw(st.sampled_from([4, 6])),
        scaling_length=8,
        attention=draw(st.sampled_from(["silu", "silu", "softmax"])),
        uvqk_activation=draw(st.sampled_from(["all", "u_only"])),
        bias=draw(st.sampled_from(["none", "position", "position_time"])),
        bias_max_len=draw(st.sampled_from([3, 64])),
        rotary=RotaryConfig(
            angles=draw(
                st.sampled_from(["none", "position", "time", "sum", "split_dims", "split_heads"])
            )
        ),
        semi_local=SemiLocalConfig(
            window=window,
            global_rows=rows,
            global_columns=draw(st.sampled_from([0, 2])) if window else 0,
        ),
        truncation=truncation,
        norm=draw(st.sampled_from(["layer", "group"])),
        concat_ua=draw(st.booleans()),
        final_norm=draw(st.booleans()),
    )
    return train_config(
        data,
        encoder=encoder,
        num_layers=3,
        mixture=mixture,
        hstu=hstu,
        transformer=TransformerConfig(num_heads=2),
        encoding=EncodingConfig(
            position=draw(st.sampled_from(positions)),
            position_buckets=12,
            time=draw(st.sampled_from(["none", "sqrt", "log"])) if by_session else "none",
            gap=draw(st.sampled_from(["none", "log"])),
            hour_sinusoid=draw(st.booleans()),
            periodic=draw(st.sampled_from([(), ("hour", "weekday")])),
            candidate_action=draw(st.sampled_from(["zero", "learned"])),
        ),
        head=HeadConfig(ranking_hidden=(6,)),
        **vectors_of_items(vectors),
    )


@cache
def vectors_of_items(use):
    """Return the part of a ModelConfig that reads vectors of some items: none, or its `use`."""
    if use == "none":
        return {}
    path = Path(tempfile.mkdtemp()) / "vectors.npy"
    atexit.register(shutil.rmtree, path.parent)
    np.save(path, np.random.default_rng(5).standard_normal((NUM_ITEMS // 2, 3), np.float32))
    if use == "cold_start":
        return {"cold_start": ColdStartConfig(path=str(path), hidden=(5,))}
    return {"pretrained": {"content": PretrainedConfig(path=str(path), feature="item_id")}}


def make_model(config, seed=2):
    """Return the dense part in float64, its weights large, so that whatever reaches it shows."""
    torch.manual_seed(seed)
    model = dense_model(config, feature_dims(config), 3600).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def make_lookup(config, dtype=torch.float64):
    tables = make_tables(config)
    has_vectors = config.model.pretrained or config.model.cold_start.path
    finder = dense_model(config, feature_dims(config), 3600) if has_vectors else None

    def lookup(batch):
        if finder is not None:
            rows = finder.find_vectors(batch)[0]
            if finder.content is not None and NEGATIVE_ITEM_ID in batch.ids.keys():  # noqa: SIM118
                ids = batch.ids[NEGATIVE_ITEM_ID].values()
                rows[vectors_key(NEGATIVE_ITEM_ID)] = finder.content.find(ids)
            batch = replace(batch, vector_rows=rows)
        ids = Vocabulary(config.embeddings).rows(batch.lookup_ids(), batch.partition)
        batch = replace(batch, ids=ids)
        with torch.no_grad():
            return batch, {k: v.to(dtype) for k, v in tables.lookup(ids).items()}

    return lookup


def make_scorer(config, **options):
    return Scorer(config, make_model(config), make_lookup(config), torch.device("cpu"), **options)


def random_events(rng, count, start):
    """Return columns of events in the order of time, and the time after the last."""
    columns = {name: [] for name in ("item_id", "timestamp", "click", "watch", "tab", "price")}
    columns |= {name: [] for name in ("seen", "genres", "country", "age", "creators")}
    time = start
    for _ in range(count):
        time += rng.choice([0, 7, 60, 2_500])
        event = {
            "item_id": rng.randrange(NUM_ITEMS),
            "timestamp": time,
            "click": rng.choice([True, False, None]),
            "watch": rng.choice([None, 0.0, 2.0, 7.5]),
            **random_item(rng),
            **random_context(rng),
        }
        for name, column in columns.items():
            column.append(event[name])
    return columns, time


def random_item(rng):
    return {
        "tab": rng.choice([None, 0, 3]),
        "price": rng.choice([None, 0.5, 1.0, 9.0]),
        "seen": rng.choice([None, 1.5]),
        "genres": rng.choice([None, [], [3], [0, None, 4]]),
    }


def random_context(rng):
    return {
        "country": rng.choice([None, 4, 5]),
        "age": rng.choice([None, 30.0]),
        "creators": rng.choice([None, [], [1, 2], [2, 1, 0]]),
    }


def joined(columns):
    return {name: [x for each in columns for x in each[name]] for name in columns[0]}


class World:
    """Users whose histories grow, and requests for them."""

    def __init__(self, config, seed, lengths):
        self.config, self.rng = config, random.Random(seed)
        self.encoder = RequestEncoder(config.data)
        self.events, self.times = [], []
        for length in lengths:
            events, time = random_events(self.rng, length, START)
            self.events.append(events)
            self.times.append(time)

    def grow(self, counts):
        for b, count in enumerate(counts):
            more, self.times[b] = random_events(self.rng, count, self.times[b])
            self.events[b] = joined([self.events[b], more])

    def requests(self):
        times = [t + self.rng.choice([1, 50]) for t in self.times]
        context = joined([{k: [v] for k, v in random_context(self.rng).items()} for _ in times])
        counts = [len(e["item_id"]) for e in self.events]
        users = [7 * b for b in range(len(times))]
        return self.encoder.requests(users, times, joined(self.events), counts, context)

    def candidates(self, requests, counts):
        rows = [
            {"item_id": self.rng.randrange(NUM_ITEMS), **random_item(self.rng)}
            for _ in range(sum(counts))
        ]
        names = ("item_id", "tab", "price", "seen", "genres")
        columns = {name: [row[name] for row in rows] for name in names}
        return self.encoder.candidates(requests, columns, counts)


def alone(config, model, lookup, requests, candidates):
    """Return task -> (M,), and (M, D) user vectors: each candidate by a pass of the training code.

    The candidate is the only event of its session, laid out as the run lays out what it trains on.
    """
    encoder = EventEncoder(config.data)
    history_end, item_end = np.cumsum(requests.counts), np.cumsum(candidates.counts)
    ranking, vectors = [], []
    for b in range(requests.num_requests):
        first = history_end[b] - requests.counts[b]
        history = slice(first, history_end[b])
        for i in range(item_end[b] - candidates.counts[b], item_end[b]):
            n = int(requests.counts[b])
            row = [requests.user_id[b], 0, 0, 0, requests.time[b], n, 1, *requests.context[b]]
            assert len(row) == FIRST_CONTEXT + encoder.num_context
            codes = np.zeros((n + 1, encoder.num_codes), np.uint8)
            codes[:n] = requests.codes[history]
            codes[:, -1] = 1  # targets of retrieval
            of_history = encoder.layout.supervise_history * n
            batch = assemble(
                Gathered(
                    sequences=np.array([row], np.int64),
                    ints=np.concatenate([requests.ints[history], candidates.ints[i : i + 1]]),
                    codes=codes,
                    floats=np.zeros((of_history + 1, encoder.num_floats), np.float32),
                    num_clipped=0,
                ),
                encoder,
                seed=0,
                window=0,
                position=StreamPosition((0,), 0),
                num_rejected={},
            )
            assert batch.timestamp.max() <= requests.time[b]
            batch, rows = lookup(batch)
            info = sequence_info(
                batch,
                keep_history=kept_history(config.model),
                groups=mixture_groups(config.model, config.data),
            )
            with torch.no_grad():
                out = model(batch, info, rows)
            if out.ranking:
                ranking.append({name: x[-1] for name, x in out.ranking.items()})
            vectors.append(out.user_vectors[-1] if n else torch.zeros(out.user_vectors.shape[1]))
    names = config.data.tasks if ranking else ()
    return {n: torch.stack([x[n] for x in ranking]) for n in names}, torch.stack(vectors)


def page_of(config):
    """Return the bytes of a page of all stacks."""
    scorer = make_scorer(config)
    return sum(page_bytes(x.shapes, scorer.dtype, x.layouts) for x in scorer.stacks)


def pages_in_use(scorer):
    """Return how many pages are neither free nor those of a cached user, nor the one of nobody."""
    users = scorer.users._users.values()
    assert not any(user.is_pinned for user in users)
    return sum(
        store.num_pages - 1 - store.num_free - sum(len(user.pages[index]) for user in users)
        for index, store in enumerate(scorer.users.stores)
    )
