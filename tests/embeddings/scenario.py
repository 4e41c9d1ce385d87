"""One training run that every form of the tables must reproduce, and its oracle.

The global batch of a step has two parts: on two ranks each takes one; a single rank takes both at
half the weight, which is what averaging over two ranks makes of them. So the same rows must come
out of every form on any number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.collection import build_tables
from embeddings.config import EmbeddingsConfig, RowWiseAdamWConfig, TableConfig
from embeddings.initial import initial_rows
from embeddings.tables import PendingLookup
from tests.embeddings.oracle import RowWiseOracle

SEED = 7
TABLES = {
    # Longer than a block of initial rows, and split inside one when two ranks share it.
    "item": TableConfig(
        num_embeddings=4201, dim=8, features=("item_id", "target_item_id"), init_std=0.1
    ),
    "user": TableConfig(num_embeddings=17, dim=8, ids="hashed", features=("user_id",)),
    "tag": TableConfig(num_embeddings=3, dim=4, features=("tag",), init_std=0.0),
}
TABLE_OF = {feature: name for name, table in TABLES.items() for feature in table.features}
BETAS, EPS, DECAY = (0.8, 0.97), 1e-5, 0.05


@dataclass(frozen=True)
class Case:
    """A form under test."""

    form: str
    rule: str
    sharding: tuple[str, ...] = ("row_wise",)
    device: str = "cpu"
    weights: str = "fp32"
    deterministic: bool = False
    momentum: str = "hbm"
    all_to_all: str = "fp32"
    index_dedup: str = "auto"
    cached: bool = False
    """A quarter of the rows of `item` in HBM."""
    ahead: bool = False
    """Whether a batch is sent before the one before it is looked up."""

    def config(self) -> EmbeddingsConfig:
        decay = DECAY if self.rule == "adamw" else 0.0
        tables = dict(TABLES)
        if self.cached:
            num_bytes = 4201 * 8 * (4 if self.weights == "fp32" else 2)
            tables["item"] = replace(TABLES["item"], hbm_gb=num_bytes / 4 / 2**30)
        return EmbeddingsConfig(
            tables=tables,
            form=self.form,
            optimizer=RowWiseAdamWConfig(lr=1.0, betas=BETAS, eps=EPS, weight_decay=decay),
            update_rule=f"row_wise_{self.rule}",
            sharding=self.sharding,
            weights=self.weights,
            momentum=self.momentum,
            all_to_all=self.all_to_all,
            index_dedup=self.index_dedup,
        )

    def build(self, seed: int = SEED):
        torch.use_deterministic_algorithms(self.deterministic)
        device = torch.device(self.device)
        if self.device == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        return build_tables(
            self.config(), device=device, seed=seed, num_sequences_hint=4, mean_length_hint=3.0
        )


def learning_rate(step: int) -> float:
    return 0.03 / (1 + step % 7)


def part(step: int, index: int) -> dict[str, tuple[list[list[int]], torch.Tensor]]:
    """Feature -> (rows of each sequence, (number of rows, dim) gradients) of half a global batch.

    Rows repeat within and across features, the first and last row of a table occur, the order of
    features changes, every third step lacks two features, every fifth the second half is empty.
    """
    generator = torch.Generator().manual_seed(1000 * step + index)
    features = list(TABLE_OF)
    if step % 2:
        features.reverse()
    if step % 3 == 2:
        features = [name for name in features if name not in ("tag", "target_item_id")]
    num_sequences = 0 if index == 1 and step % 5 == 4 else 3 + index
    made = {}
    for feature in features:
        table = TABLES[TABLE_OF[feature]]
        bags = []
        for _ in range(num_sequences):
            length = int(torch.randint(0, 5, (1,), generator=generator))
            few = torch.randint(0, 6, (length,), generator=generator) * 839 % table.num_embeddings
            ends = torch.tensor([0, table.num_embeddings - 1])[few % 2]
            bags.append(torch.where(few < 2, ends, few).tolist())
        count = sum(len(bag) for bag in bags)
        made[feature] = (bags, torch.randn(count, table.dim, generator=generator))
    return made


def rank_batch(step: int, rank: int, world_size: int):
    """The (KeyedJaggedTensor of rows, feature -> gradients) of a rank."""
    parts = [part(step, rank)] if world_size == 2 else [part(step, 0), part(step, 1)]
    features = list(parts[0])
    bags = [bag for name in features for half in parts for bag in half[name][0]]
    rows = KeyedJaggedTensor(
        keys=features,
        values=torch.tensor([row for bag in bags for row in bag]).long(),
        lengths=torch.tensor([len(bag) for bag in bags]).long(),
        stride=len(bags) // len(features),
    )
    grads = {name: torch.cat([half[name][1] for half in parts]) / len(parts) for name in features}
    return rows, grads


def oracle_tables(rule: str, last: int) -> dict[str, RowWiseOracle]:
    """The tables after steps 0 .. last - 1, in fp64."""
    decay = DECAY if rule == "adamw" else 0.0
    oracles = {
        name: RowWiseOracle(
            initial_rows(table, table=name, seed=SEED, first=0, last=table.num_embeddings),
            rule,
            lr=0.0,
            betas=BETAS,
            eps=EPS,
            weight_decay=decay,
        )
        for name, table in TABLES.items()
    }
    for step in range(last):
        for name, oracle in oracles.items():
            rows, grads = [], []
            for half in (part(step, 0), part(step, 1)):
                for feature in TABLES[name].features:
                    if feature in half:
                        bags, gradient = half[feature]
                        rows += [row for bag in bags for row in bag]
                        grads.append(gradient.double() / 2)
            oracle.lr = learning_rate(step)
            stacked = torch.cat(grads) if grads else torch.zeros(0, TABLES[name].dim)
            oracle.step(torch.tensor(rows).long(), stacked)
    return oracles


def catalogue(tables, chunk_rows: int = 1000) -> dict[str, torch.Tensor]:
    """Every table whole, from all_rows."""
    whole = {}
    for name in TABLES:
        chunks = []
        for first, rows in tables.all_rows(name, chunk_rows=chunk_rows):
            assert first == sum(len(chunk) for chunk in chunks)
            chunks.append(rows.detach().cpu().clone())
        whole[name] = torch.cat(chunks)
    return whole


def train_steps(tables, first: int, last: int, *, ahead: bool = False) -> None:
    """Each step looks its batch up twice: to evaluate, which must not count, and to train."""
    for step, rows, pending in sent(tables, first, last, ahead=ahead):
        if step is None:
            with torch.no_grad():
                tables.lookup(rows)
            pending.advance()
            continue
        _, grads = rank_batch(step, *rank_and_size())
        tables.set_lr(learning_rate(step))
        found = tables.lookup(rows)
        pending.advance()
        loss = sum((found[name] * grads[name].to(tables.device)).sum() for name in found)
        loss.backward()
        tables.optimizer_step()


def sent(tables, first: int, last: int, *, ahead: bool) -> Iterator[tuple]:
    """Yield (step, None to evaluate; what to look up; what was sent after it)."""
    batches = []
    for step in range(first, last):
        rows, _ = rank_batch(step, *rank_and_size())
        batches += [(None, rows.to(tables.device)), (step, rows.to(tables.device))]
    nothing = PendingLookup(rows)
    if not ahead:
        yield from ((step, rows, nothing) for step, rows in batches)
        return
    pending = tables.send(batches[0][1])
    for (step, _), (_, following) in zip(batches, [*batches[1:], (None, None)], strict=True):
        current, pending = pending, nothing if following is None else tables.send(following)
        yield step, current, pending


def rank_and_size() -> tuple[int, int]:
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def train(case: Case, first: int, last: int, *, load_from="", save_at=-1, save_to="", seed=SEED):
    """Train steps first .. last - 1; return what a rank saw."""
    tables = case.build(seed)
    if load_from:
        state = tables.checkpoint_state()
        dcp.load(state, checkpoint_id=load_from)
        tables.load_checkpoint_state(state)
    result = {"initial": catalogue(tables), "plan": tables.plan_summary()}
    rows, _ = rank_batch(first, *rank_and_size())
    found = tables.lookup(rows.to(tables.device))
    result["lookup"] = {name: x.detach().cpu() for name, x in found.items()}
    if save_to:
        train_steps(tables, first, save_at, ahead=case.ahead)
        dcp.save(tables.checkpoint_state(), checkpoint_id=save_to)
        first = save_at
    train_steps(tables, first, last, ahead=case.ahead)
    local = {name: tables.local_weight(name) for name in TABLES}
    local = {name: None if x is None else x.float().cpu() for name, x in local.items()}
    return {**result, "final": catalogue(tables), "local": local, "steps": tables.steps}
