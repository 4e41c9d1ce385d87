"""A training run on ids that come and go, which every form must reproduce on any number of ranks.

The global batch of a step has four parts, which the ranks share out evenly; the gradient of a part
counts a quarter. Ids drift: each step knows only a stretch of them, so that rows run out.
"""

from dataclasses import dataclass

import torch
import torch.distributed.checkpoint as dcp
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.collection import build_tables
from embeddings.config import DynamicIdsConfig, EmbeddingsConfig, RowWiseAdamWConfig, TableConfig
from embeddings.dynamic import DynamicVocabulary
from embeddings.initial import initial_rows, rows_of_ids
from tests.embeddings.id_oracle import IdOracle
from tests.embeddings.oracle import RowWiseOracle
from tests.embeddings.scenario import BETAS, DECAY, EPS, learning_rate, rank_and_size

SEED, ROWS, DIM, PARTS, HOUR = 5, 24, 8, 4, 3600
TABLES = {
    "item": TableConfig(
        num_embeddings=ROWS,
        dim=DIM,
        ids="dynamic",
        features=("item_id", "target_item_id", "negative_item_id"),
        init_std=0.1,
        dynamic=DynamicIdsConfig(admit_after=2, max_waiting=8, ttl_days=0.25),
    ),
    "user": TableConfig(
        num_embeddings=9, dim=DIM, ids="dynamic", features=("user_id",), init_std=0.1
    ),
    "tag": TableConfig(num_embeddings=5, dim=4, features=("tag",), init_std=0.1),
}
FEATURES = ("item_id", "target_item_id", "negative_item_id", "user_id", "tag")
TABLE_OF = {feature: name for name, table in TABLES.items() for feature in table.features}


@dataclass(frozen=True)
class DynamicCase:
    form: str = "replicated"
    rule: str = "adamw"
    sharding: tuple[str, ...] = ("row_wise",)
    device: str = "cpu"
    momentum: str = "hbm"

    def build(self):
        decay = DECAY if self.rule == "adamw" else 0.0
        config = EmbeddingsConfig(
            tables=TABLES,
            form=self.form,
            optimizer=RowWiseAdamWConfig(lr=1.0, betas=BETAS, eps=EPS, weight_decay=decay),
            update_rule=f"row_wise_{self.rule}",
            sharding=self.sharding,
            momentum=self.momentum,
        )
        device = torch.device(self.device)
        if self.device == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        tables = build_tables(
            config, device=device, seed=SEED, num_sequences_hint=4, mean_length_hint=3.0
        )
        vocabulary = DynamicVocabulary(
            config, device=device, seed=SEED, drawn=("negative_item_id",)
        )
        return tables, vocabulary


def part(step: int, index: int):
    """Ids and gradients by feature, which of item_id are events, and the time, of one part."""
    generator = torch.Generator().manual_seed(100 * step + index)

    def ints(low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    num = 0 if step % 5 == index else 6 + index
    ids = {
        # Now and then unknown, spread over 64 bits, and of another stretch every step.
        "item_id": torch.where(ints(0, 9, num) == 0, -1, (ints(0, 30, num) + 4 * step) << 55),
        "target_item_id": (ints(0, 30, num // 2) + 4 * step) << 55,
        "negative_item_id": ints(0, 2**62, 3),
        "user_id": ints(0, 6, num // 3) + step // 2,
        "tag": ints(0, 5, num // 2),
    }
    grads = {
        name: torch.randn(len(x), TABLES[TABLE_OF[name]].dim, generator=generator)
        for name, x in ids.items()
    }
    is_event = ints(0, 3, num) > 0
    return ids, grads, is_event, ((step + 5 * (step // 8)) * HOUR if num else None)


def rank_batch(step: int):
    """Ids, gradients, events and time of this rank's share."""
    rank, size = rank_and_size()
    own = [part(step, i) for i in range(rank * PARTS // size, (rank + 1) * PARTS // size)]
    ids = {name: torch.cat([each[0][name] for each in own]) for name in FEATURES}
    batch = KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.cat([*ids.values()]),
        lengths=torch.tensor([len(each[0][name]) for name in FEATURES for each in own]),
        stride=len(own),
    )
    grads = {name: torch.cat([x[1][name] for x in own]) * size / PARTS for name in FEATURES}
    is_event = torch.cat([each[2] for each in own])
    times = [each[3] for each in own if each[3] is not None]
    return batch, grads, is_event, max(times, default=None)


def train_steps(tables, vocabulary, first: int, last: int) -> None:
    for step in range(first, last):
        ids, grads, is_event, time = rank_batch(step)
        events = {
            "item_id": is_event.to(tables.device),
            "user_id": torch.ones(len(grads["user_id"]), dtype=torch.bool, device=tables.device),
        }
        tables.set_lr(learning_rate(step))
        rows, seen = vocabulary.map(ids.to(tables.device), events)
        found = tables.lookup(rows)
        vocabulary.observe(seen, step=step, time=time)
        sum((found[name] * grads[name].to(tables.device)).sum() for name in found).backward()
        tables.optimizer_step()
        tables.optimizer_zero_grad()
        vocabulary.apply(tables)


def by_id(tables, vocabulary) -> dict[str, dict[int, torch.Tensor]]:
    """The vector of every id, as a lookup finds it, and of the unknown id."""
    found = {}
    for name in TABLES:
        whole = torch.cat([rows.clone() for _, rows in tables.all_rows(name, 7)]).cpu()
        if name not in vocabulary.maps:
            found[name] = dict(enumerate(whole))
            continue
        ids = vocabulary.maps[name].index.ids
        keys = KeyedJaggedTensor(
            keys=[TABLES[name].features[0]], values=ids, lengths=ids[:1] * 0 + len(ids)
        )
        rows, _ = vocabulary.map(keys, {})
        vectors = whole[rows.values().cpu()]
        found[name] = {-1: whole[0], **dict(zip(ids.tolist(), vectors, strict=True))}
        unused = ~vocabulary.is_used(name).cpu()
        assert not whole[1:][unused[1:]].any(), "a row that no id has is not zero"
    return found


def run(case: DynamicCase, first: int, last: int, load_from: str = "", save_to: str = ""):
    """Train; return the vectors of ids, after loading and at the end, and the metrics."""
    tables, vocabulary = case.build()
    if load_from:
        state = {"t": tables.checkpoint_state(), "v": vocabulary.checkpoint_state()}
        dcp.load(state, checkpoint_id=load_from)
        tables.load_checkpoint_state(state["t"])
        vocabulary.load_checkpoint_state(state["v"])
    before = by_id(tables, vocabulary)
    train_steps(tables, vocabulary, first, last)
    if save_to:
        state = {"t": tables.checkpoint_state(), "v": vocabulary.checkpoint_state()}
        dcp.save(state, checkpoint_id=save_to)
    return before, by_id(tables, vocabulary), vocabulary.take_metrics()


def expected(
    rule: str, last: int
) -> tuple[dict[str, dict[int, torch.Tensor]], dict[str, IdOracle]]:
    """The vectors after steps 0 .. last - 1 in fp64, one row at a time, and the maps."""
    decay = DECAY if rule == "adamw" else 0.0
    options = {"betas": BETAS, "eps": EPS, "weight_decay": decay}
    tables = {
        name: RowWiseOracle(
            initial_rows(table, table=name, seed=SEED, first=0, last=table.num_embeddings),
            rule,
            lr=0.0,
            **options,
        )
        for name, table in TABLES.items()
    }
    maps = {"item": IdOracle(ROWS, 2, 8, ttl=6 * HOUR), "user": IdOracle(9)}
    for step in range(last):
        parts = [part(step, i) for i in range(PARTS)]
        times = [each[3] for each in parts if each[3] is not None]
        for name, oracle in tables.items():
            rows, grads, looked_up, events = [], [], [], []
            known = maps[name].row if name in maps else {}
            for ids, gradient, is_event, _ in parts:
                for feature in TABLES[name].features:
                    values = ids[feature].tolist()
                    grads.append(gradient[feature].double() / PARTS)
                    if feature == "negative_item_id":
                        in_use = sorted(known)
                        rows += [known[in_use[x % len(in_use)]] if in_use else 0 for x in values]
                        continue
                    rows += [known.get(x, 0) if name in maps else x for x in values]
                    looked_up += values
                if name == "item":
                    events += ids["item_id"][is_event].tolist()
                elif name == "user":
                    events += ids["user_id"].tolist()
            oracle.lr = learning_rate(step)
            oracle.step(torch.tensor(rows).long(), torch.cat(grads))
            if name not in maps:
                continue
            admitted, freed = maps[name].observe(looked_up, events, step, max(times))
            new = rows_of_ids(TABLES[name], torch.tensor(admitted).long(), table=name, seed=SEED)
            fresh = dict(zip((maps[name].row[x] for x in admitted), new.tolist(), strict=True))
            for row in {*freed, *fresh}:
                oracle.w[row] = fresh.get(row, [0.0] * DIM)
                oracle.m[row], oracle.v[row] = [0.0] * DIM, 0.0
    vectors = {
        name: {-1: 0, **maps[name].row} if name in maps else {i: i for i in range(5)}
        for name in TABLES
    }
    return {
        name: {x: torch.tensor(tables[name].w[row]) for x, row in each.items()}
        for name, each in vectors.items()
    }, maps
