"""`gr export`: a checkpoint for inference, which gr/exported.py loads without the sparse stack.

Letters: n events of history, m candidates, L tokens, D model dim.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from embeddings.int4 import FLOAT16_MAX, quantize_int4
from gr.atomic import write_atomically
from gr.config import TrainConfig
from gr.exported import AOT, CONFIG, FORMAT, MANIFEST, PROGRAMS, ExportedModel, ExportedTable
from gr.inference.engine import Question, Recommender, before, load_trainer, recommender_of
from gr.model import SequenceModel
from gr.parallel import World
from gr.sequence import SequenceInfo
from gr.trainer import Trainer
from pipelines.config import DataConfig, bag_features

CHECKED_USERS = 8
TOLERANCE = 1e-4
"""Of an output of the ranking head: float32, and another order of its sums."""


class OneRequest(nn.Module):
    """A model on one history and its candidates, whose numbers of events and items stay open.

    The tokens are laid out as pipelines.unify does, candidates at the end.

    Args:
        model: trained.
        data: of its run.
        num_events: 0, 1, or 2 for any larger number.
    """

    def __init__(self, model: SequenceModel, data: DataConfig, num_events: int) -> None:
        super().__init__()
        self.model, self.num_events = model, num_events
        self.interleaved = data.layout == "interleaved"
        self.context = tuple(data.context_features) if data.context == "prefix" else ()

    def forward(
        self,
        rows: dict[str, Tensor],
        numbers: dict[str, Tensor],
        codes: Tensor,
        history_time: Tensor,
        time: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the outputs of the ranking head for each candidate, and the user's vector.

        Args:
            rows: feature -> (n + m, width) looked-up rows; of the context (1, width).
            numbers: feature -> (n + m,) or (1,) float32.
            codes: (n, S) int64.
            history_time: (n,) int64 s.
            time: () int64 s.
        """
        tokens, n = self.model.tokens, codes.shape[0]
        item = tokens._sum(tokens.item_features, rows)
        for name in tokens.item_numbers:
            item = item + tokens.numbers.encode(name, numbers[name])
        m = item.shape[0] - n
        history, times = item[:n], history_time
        if tokens.action is not None:
            action = tokens.action(codes + tokens.code_start_S).sum(1)
        else:
            action = torch.zeros_like(history)
        if self.interleaved:
            history = torch.stack([history, action], 1).flatten(0, 1)
            times = torch.stack([times, times], 1).flatten()
        else:
            history = history + action
        candidates = item[n:]
        if tokens.candidate_action is not None:
            candidates = candidates + tokens.candidate_action
        head = [self._context(name, rows, numbers) for name in self.context]
        x_LD = torch.cat([*head, history, candidates])
        timestamp = torch.cat([time.expand(len(head)), times, time.expand(m)])
        L, start = x_LD.shape[0], len(head) + history.shape[0]
        tail = m + (self.num_events > 0)
        one = torch.ones(1, dtype=torch.int64)
        info = SequenceInfo(
            offsets=_ends(L),
            tail_offsets=_ends(tail),
            max_len=L,
            max_tail_len=tail,
            timestamp=timestamp,
            query_time=torch.cat([timestamp[1:], timestamp[-1:]]),
            session_start=one * start,
            num_context=len(head),
            num_candidates=one * m,
            num_rows=tail,
        )
        y_RD = self.model.encoder(self.model.encoding(x_LD, info), info)
        first = tail - m
        ranking = self.model.ranking(y_RD[first:]) if self.model.ranking is not None else {}
        vector = None
        if self.model.retrieval is not None and self.num_events > 0:
            vector = self.model.retrieval(y_RD[:1])[0]
        return ranking, vector

    def _context(self, name: str, rows: dict[str, Tensor], numbers: dict[str, Tensor]) -> Tensor:
        tokens = self.model.tokens
        if name in numbers:
            return tokens.numbers.encode(name, numbers[name])
        return tokens._sum((name,), rows)


def export(
    config: TrainConfig,
    run_dir: str,
    output: str | Path,
    *,
    tables: str = "fp16",
    step: int | None = None,
    aot: bool = False,
) -> str:
    """Write a checkpoint for inference, check it against the model, and return a summary.

    Args:
        config: `gr.evaluate.run_config` of the run.
        run_dir: the run directory.
        output: folder to write; must not be there, or be empty.
        tables: fp32, fp16, int8 or int4: rows of the embedding tables.
        step: of the checkpoint; None means the newest.
        aot: compile the dense part with AOTInductor too.

    Raises:
        ValueError: if the model has a part that is not exported, a table does not fit the format,
            or the output is there.
        AssertionError: if the exported model does not give what the model gives.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output {folder} is there and not empty: name another folder")
    if tables not in ("fp32", "fp16", "int8", "int4"):
        raise ValueError(f"--tables must be fp32, fp16, int8 or int4, got {tables!r}")
    check_exportable(config)
    trainer, step = load_trainer(config, run_dir, world=World(0, 1, torch.device("cpu")), step=step)
    recommender = recommender_of(trainer, step)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    written = {
        name: _write_table(trainer, name, tables, folder) for name in config.embeddings.tables
    }
    write_atomically(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config)))
    programs = _export_programs(trainer, folder)
    if aot:
        torch._inductor.aoti_compile_and_package(programs[2], package_path=str(folder / AOT))
    data = config.data
    context = data.context_features if data.context == "prefix" else {}
    manifest = {
        "format": FORMAT,
        "step": step,
        "run": str(Path(run_dir).resolve()),
        "torch": torch.__version__,
        "max_events": recommender.max_events,
        "retrieval": config.model.head.retrieval,
        "inputs": [*data.item_features, *context],
        "tables": written,
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    worst = _check(recommender, trainer, ExportedModel(folder))
    num_bytes = sum(x["bytes"] for x in written.values())
    return (
        f"{folder}: step {step}, tables {tables} {num_bytes / 1e6:,.1f} MB, dense part by "
        f"torch.export{' and AOTInductor' if aot else ''}; of {CHECKED_USERS} users the largest "
        f"difference from the model with the same rows is {worst:.1e}"
    )


def check_exportable(config: TrainConfig) -> None:
    """Refuse what OneRequest does not lay out.

    Raises:
        ValueError: naming the settings.
    """
    data, model = config.data, config.model
    refused = {
        f"model.encoder={model.encoder}": model.encoder not in ("hstu", "sasrec", "transformer"),
        "data.window=epoch": data.window == "epoch",
        "data.context=merged": data.context == "merged",
        "data.action_context": bool(data.action_context),
        "features with max_values": bool(bag_features(data)),
        "counters": any(x.is_counter for x in data.item_features.values()),
        "model.pretrained": bool(model.pretrained),
        "model.cold_start": bool(model.cold_start.path),
        "model.hstu.truncation": bool(model.hstu.truncation.layers),
        "model.hstu.semi_local with data.anchor=event": data.anchor == "event"
        and bool(model.hstu.semi_local.window),
        "model.mixture": bool(model.mixture),
        "model.hstu.precision=fp8": model.hstu.precision == "fp8",
    }
    found = [name for name, is_set in refused.items() if is_set]
    if found:
        raise ValueError(
            f"gr export does not write models with {', '.join(found)}: serve the run itself "
            "(gr serve)"
        )


def _export_programs(trainer: Trainer, folder: Path) -> dict[int, ExportedProgram]:
    config, model = trainer.config, trainer.model
    assert isinstance(model, SequenceModel)
    model.eval()
    dims = {f: t.dim for t in config.embeddings.tables.values() for f in t.features}
    data = config.data
    context = data.context_features if data.context == "prefix" else {}
    programs = {}
    for num_events, name in PROGRAMS.items():
        n, m = (5 if num_events == 2 else num_events), 6
        features = {"item_id": None, **data.item_features}
        rows = {f: torch.randn(n + m, dims[f]) for f, x in features.items() if _has_rows(x)}
        rows |= {f: torch.randn(1, dims[f]) for f, x in context.items() if _has_rows(x)}
        numbers = {f: torch.randn(n + m) for f, x in data.item_features.items() if x.is_number}
        numbers |= {f: torch.randn(1) for f, x in context.items() if x.is_number}
        codes = torch.zeros(n, len(data.actions), dtype=torch.int64)
        arguments = (rows, numbers, codes, torch.arange(n), torch.tensor(n))
        free = {0: Dim.DYNAMIC}
        events = free if num_events == 2 else None
        shapes = (
            {f: None if f in context else free for f in rows},
            {f: None if f in context else free for f in numbers},
            *(events, events, None),
        )
        with torch.no_grad():
            programs[num_events] = torch.export.export(
                OneRequest(model, data, num_events),
                arguments,
                dynamic_shapes=shapes,
                strict=False,
            )
        torch.export.save(programs[num_events], folder / name)
    return programs


def _has_rows(feature: Any) -> bool:
    return feature is None or not feature.is_number


def _ends(length: Any) -> Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    return torch.stack([zero, torch.scalar_tensor(length, dtype=torch.int64)])


def pack_rows(rows_ND: Tensor, form: str, *, name: str, first: int = 0) -> Tensor:
    """Return rows as an exported table holds them; `ExportedTable.lookup` reads them.

    Args:
        rows_ND: float32.
        form: fp32, fp16, int8 or int4.
        name: of the table, for messages.
        first: number of the first row, for messages.

    Raises:
        ValueError: if a row does not fit the format.
    """
    if form == "fp32":
        return rows_ND.clone()
    if form == "int4":
        return quantize_int4(rows_ND, name=name, first=first)
    if form == "int8":
        packed: Tensor = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(rows_ND.contiguous())
        return packed
    if not bool((rows_ND.abs() <= FLOAT16_MAX).all()):
        raise ValueError(f"table {name!r} holds values beyond {FLOAT16_MAX}: use fp32")
    return rows_ND.half()


def _write_table(trainer: Trainer, name: str, form: str, folder: Path) -> dict[str, Any]:
    table = trainer.config.embeddings.tables[name]
    stored = torch.cat(
        [
            pack_rows(rows.cpu().float(), form, name=name, first=first)
            for first, rows in trainer.tables.all_rows(name)
        ]
    )
    file = f"tables/{name}.npy"
    np.save(folder / file, stored.numpy())
    about = {
        "file": file,
        "format": form,
        "shape": list(stored.shape),
        "dim": table.dim,
        "ids": table.ids,
        "features": list(table.features),
        "bytes": stored.numel() * stored.element_size(),
    }
    if table.ids == "dynamic":
        dynamic = trainer.id_rows.dynamic
        row = dynamic.is_used(name).nonzero()[:, 0]
        ids = dynamic.ids(name)[row]
        order = ids.argsort()
        file = f"tables/{name}_ids.npz"
        about["map"] = file
        np.savez(folder / file, ids=ids[order].numpy(), rows=row[order].numpy())
    return about


def _check(recommender: Recommender, trainer: Trainer, exported: ExportedModel) -> float:
    """Compare the exported model, with the trainer's own rows, with the Recommender.

    Returns:
        The largest difference of an output of the ranking head, or of a user's vector.
    """
    own = {
        name: ExportedTable(
            "fp32",
            torch.cat([rows.float().clone() for _, rows in trainer.tables.all_rows(name)]),
            table.ids,
            table.known_ids,
            table.known_rows,
        )
        for name, table in exported.tables.items()
    }
    rounded, exported.tables = exported.tables, own
    store, worst = recommender.store, 0.0
    try:
        for user in store.users()[:CHECKED_USERS].tolist():
            whole = store.history(user)
            assert whole is not None
            ids = np.unique(whole.ints[:, 0])[:5]
            for events in (len(whole.ints), 1, 0):
                time = int(whole.ints[min(events, len(whole.ints)) - 1, 1]) + 1 if events else 0
                history = before(whole, time, recommender.max_events)
                rows = recommender.item_rows(ids, time=time, context=history.context)
                question = Question(user_id=user, time=time, history=history, candidates=rows)
                codes = history.codes[:, :-1]
                outputs, vector = exported.run(history.ints, codes, history.context, rows, time)
                worst = max(worst, _difference(recommender, question, outputs, vector))
    finally:
        exported.tables = rounded
    assert worst <= TOLERANCE, f"the exported model differs from the model by {worst:.3e}"
    return worst


def _difference(
    recommender: Recommender,
    question: Question,
    outputs: dict[str, Tensor],
    vector: Tensor | None,
) -> float:
    ranking, wanted = recommender.raw(question)
    worst = max(
        (float((outputs[name] - x).abs().max()) for name, x in ranking.items()), default=0.0
    )
    if vector is not None and wanted is not None:
        worst = max(worst, float((vector - wanted).abs().max()))
    return worst
