"""`python -m gr.inference.bench_tables RUN`: what tables in fewer bits cost in quality.

One pass over the run's log with one checkpoint: each batch is scored once a format, with all tables
rounded to it. Prints bytes of the tables, the NE of each binary task and its change, and how much
of the top 100 of the catalogue stays.
"""

import argparse
import sys

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from embeddings.replicated import ReplicatedTables
from gr.evaluate import run_config
from gr.exported import ExportedTable
from gr.inference.engine import load_trainer
from gr.inference.export import pack_rows
from gr.model import SequenceModel
from gr.parallel import World
from gr.trainer import Trainer
from kernels.top_k import top_k
from pipelines.stream import SessionStream

FORMATS = ("fp32", "fp16", "int8", "int4")
TOP = 100


class Rounded:
    """The tables of a trainer in one format, and what the model says with them.

    Args:
        trainer: with the exact tables.
        form: fp32, fp16, int8 or int4.
    """

    def __init__(self, trainer: Trainer, form: str) -> None:
        assert isinstance(trainer.tables, ReplicatedTables)
        self.weights: dict[str, Tensor] = {}
        self.num_bytes = 0
        for name, weight in trainer.tables.weights.items():
            table = ExportedTable(form, pack_rows(weight.detach(), form, name=name), "static")
            self.num_bytes += table.rows.numel() * table.rows.element_size()
            self.weights[name] = table.lookup(torch.arange(len(table.rows)))
        self.loss = {n: 0.0 for n, task in trainer.config.data.tasks.items() if is_binary(task)}
        self.users: list[Tensor] = []


def is_binary(task: object) -> bool:
    """Return whether a task has an NE."""
    return getattr(task, "type", "") == "binary"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", metavar="RUN", help="run directory")
    parser.add_argument("--steps", type=int, default=0, help="global batches to score; 0: all")
    parser.add_argument("--users", type=int, default=4096, help="user vectors to retrieve with")
    arguments = parser.parse_args()
    config = run_config(arguments.run_dir, ["eval.retrieval=false"])
    trainer, step = load_trainer(config, arguments.run_dir, world=World(0, 1, torch.device("cpu")))
    tables = trainer.tables
    assert isinstance(tables, ReplicatedTables)
    rounded = {form: Rounded(trainer, form) for form in FORMATS}
    names = list(rounded["fp32"].loss)
    positives, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    num_users = num_batches = 0
    stream = SessionStream(config.data, seed=config.seed)
    last = arguments.steps or stream.num_steps
    # The newest steps: what a model is used for comes after what it learnt.
    for batch in tqdm(stream, total=stream.num_steps, disable=not sys.stderr.isatty()):
        if batch.position.step <= stream.num_steps - last:
            continue
        num_batches += 1
        for each in rounded.values():
            for name, weight in tables.weights.items():
                weight.data = each.weights[name]
            scored = trainer.predict_step(batch)
            for name in names:
                loss = functional.binary_cross_entropy_with_logits(
                    scored.predictions.ranking[name].double(),
                    batch.labels[name].double(),
                    weight=batch.weights[name].double(),
                    reduction="sum",
                )
                each.loss[name] += float(loss)
            vectors = scored.predictions.user_vectors
            if vectors is not None and num_users < arguments.users:
                each.users.append(vectors)
        num_users = sum(len(x) for x in rounded["fp32"].users)
        for name in names:
            weights = batch.weights[name].double()
            positives[name] += float((weights * batch.labels[name]).sum())
            counts[name] += float(weights.sum())
    entropy = {n: entropy_of(positives[n] / counts[n]) * counts[n] for n in names}
    items = {form: item_vectors(trainer, each) for form, each in rounded.items()}
    best = {
        form: top_k(torch.cat(each.users), items[form], TOP).rows for form, each in rounded.items()
    }
    print(
        f"checkpoint step {step}, {num_batches} batches, {int(counts[names[0]]):,} events, "
        f"{num_users:,} user vectors"
    )
    columns = ["tables", "MB", "fewer bytes than fp16", f"top {TOP} shared with fp16"]
    print(f"| {' | '.join([*columns, *(f'NE {n} (change)' for n in names)])} |")
    print("|" + "---|" * (len(columns) + len(names)))
    for form, each in rounded.items():
        shared = overlap(best[form], best["fp16"])
        ne = [
            f"{each.loss[n] / entropy[n]:.5f} ({each.loss[n] / rounded['fp16'].loss[n] - 1:+.4%})"
            for n in names
        ]
        fewer = rounded["fp16"].num_bytes / each.num_bytes
        print(
            f"| {form} | {each.num_bytes / 1e6:.2f} | {fewer:.2f}x | {shared:.2%} | "
            f"{' | '.join(ne)} |"
        )


def item_vectors(trainer: Trainer, each: Rounded) -> Tensor:
    """Return the items as users are compared with them, without the unknown one."""
    assert isinstance(trainer.model, SequenceModel)
    rows = each.weights[trainer.item_table][1:]
    with torch.no_grad():
        return trainer.model.item_vectors(rows, torch.arange(len(rows)))


def overlap(a_QK: Tensor, b_QK: Tensor) -> float:
    """Return the mean share of a query's rows that both hold."""
    return float((a_QK[:, :, None] == b_QK[:, None, :]).any(2).double().mean())


def entropy_of(rate: float) -> float:
    """Return the entropy of a label, nats."""
    p = torch.tensor(rate, dtype=torch.float64)
    return float(-(p * p.log() + (1 - p) * (-p).log1p()))


if __name__ == "__main__":
    main()
