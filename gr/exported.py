"""An exported model: what `gr export` writes, used without torchrec, FBGEMM or the training code.

It needs torch, numpy and pyarrow, and of this package what encodes events. Tables are float32,
float16, 8 or 4 bits, in host memory; the dense part is programs of torch.export, of one request
each, or the same compiled ahead of time by AOTInductor.

Letters: n events of history, m candidates, E rows, D width of a row, k results.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from embeddings.hashing import hash_ids
from gr.config import TrainConfig
from gr.config_io import load_config
from kernels.int4_rows.reference import dequantize_int4
from kernels.top_k import top_k
from pipelines.config import ITEM_ID, TaskConfig
from pipelines.feature_columns import UNKNOWN_ID, read_numbers
from pipelines.features import EventEncoder
from pipelines.history import TIMESTAMP, Ints
from pipelines.schema import EVENT_TIMESTAMP, USER_ID

FORMAT = 1
MANIFEST, CONFIG = "manifest.json", "config.yaml"
PROGRAMS = {0: "dense_0.pt2", 1: "dense_1.pt2", 2: "dense.pt2"}
"""By events of history: torch.export fixes a length of 0 or 1."""
AOT = "dense_aot.pt2"
LEAST_ITEMS = 4
"""Candidates that a program takes at least; fewer are repeated."""
INT8_CONSTANTS = 8
"""Bytes of scale and bias."""
NORM_EPS = 1e-6
_TYPES = {
    "integer": pa.int64(),
    "number": pa.float64(),
    "integers": pa.list_(pa.int64()),
    "numbers": pa.list_(pa.float64()),
}
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class ExportedTable:
    """Rows of an embedding table, as they lie in memory."""

    format: str
    """fp32, fp16, int8 or int4."""
    rows: Tensor
    """(E, D), or (E, bytes) uint8."""
    ids: str
    """static, hashed or dynamic."""
    known_ids: Ints | None = None
    """(n,) int64 ascending: of a dynamic table."""
    known_rows: Ints | None = None
    """(n,) int64: their rows."""

    def rows_of(self, ids: Ints, feature: str) -> Tensor:
        """Return the row of each id; unknown ids have row 0.

        Raises:
            ValueError: for an id outside a static table.
        """
        if self.ids == "static":
            bad = (ids < UNKNOWN_ID) | (ids > len(self.rows) - 2)
            if bad.any():
                raise ValueError(
                    f"feature {feature!r}: expected ids in 0 .. {len(self.rows) - 2} (-1: "
                    f"unknown), got {int(ids[bad][0])}"
                )
            return torch.from_numpy(ids + 1)
        if self.ids == "hashed":
            x = torch.from_numpy(ids)
            return torch.where(x == UNKNOWN_ID, 0, 1 + hash_ids(x) % (len(self.rows) - 1))
        assert self.known_ids is not None
        assert self.known_rows is not None
        if not len(self.known_ids):
            return torch.zeros(len(ids), dtype=torch.int64)
        place = np.minimum(np.searchsorted(self.known_ids, ids), len(self.known_ids) - 1)
        row = np.where(self.known_ids[place] == ids, self.known_rows[place], 0)
        return torch.from_numpy(row)

    def lookup(self, rows_R: Tensor) -> Tensor:
        """Return (R, D) float32."""
        chosen = self.rows.index_select(0, rows_R)
        if self.format == "int4":
            return dequantize_int4(chosen, torch.float32)
        if self.format == "int8":
            return dequantize_int8(chosen)
        return chosen.float()


def dequantize_int8(rows_NW: Tensor) -> Tensor:
    """Return (N, D) float32: value * scale + bias of rows of D bytes, float32 scale and bias.

    Source: row format of FBGEMM's FloatToFused8BitRowwiseQuantized.
    """
    constants = rows_NW[:, -INT8_CONSTANTS:].contiguous().view(torch.float32)
    return rows_NW[:, :-INT8_CONSTANTS].float() * constants[:, :1] + constants[:, 1:]


class ExportedModel:
    """Scores candidates and retrieves items for one user at a time, on the CPU.

    Args:
        folder: that `gr export` wrote.
        aot: use the program that AOTInductor compiled, where the request fits it; None: if it is
            there.

    Raises:
        ValueError: if the folder is no export, of another format, or lacks what is asked for.
    """

    def __init__(self, folder: str | Path, *, aot: bool | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} is no exported model: no {MANIFEST} in it. Run gr export")
        self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if self.manifest.get("format") != FORMAT:
            raise ValueError(
                f"{folder} has format {self.manifest.get('format')}, this version reads {FORMAT}: "
                "run gr export again"
            )
        config, _ = load_config(TrainConfig, self.folder / CONFIG, ())
        self.data, self.head = config.data, config.model.head
        self.encoder = EventEncoder(self.data)
        self.max_events: int = self.manifest["max_events"]
        self.tasks: dict[str, TaskConfig] = dict(self.data.tasks)
        self.tables = {name: self._table(x) for name, x in self.manifest["tables"].items()}
        self.table_of: dict[str, str] = {
            feature: name
            for name, x in self.manifest["tables"].items()
            for feature in x["features"]
        }
        self._programs = {
            n: torch.export.load(self.folder / name).module() for n, name in PROGRAMS.items()
        }
        has_aot = (self.folder / AOT).is_file()
        if aot and not has_aot:
            raise ValueError(f"{folder} has no {AOT}: run gr export with --aot")
        self._aot = None
        if has_aot and aot is not False:
            self._aot = torch._inductor.aoti_load_package(str(self.folder / AOT))
        self._catalogue: tuple[Ints, Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the tables."""
        return sum(x.rows.numel() * x.rows.element_size() for x in self.tables.values())

    def score(
        self,
        history: Columns,
        time: int,
        candidates: Columns,
        *,
        context: Mapping[str, Any] | None = None,
        user_id: int = UNKNOWN_ID,
    ) -> dict[str, NDArray[np.float32]]:
        """Return task -> (m,): the probability, or the value in the unit of the log.

        Args:
            history: column of an event -> (n,) values; a column that is left out is unknown.
                Only the newest events strictly before the time are read.
            time: of the prediction, s.
            candidates: item_id and columns of features -> (m,) values.
            context: column of the context -> value.
            user_id: where the context has it as a feature.

        Raises:
            ValueError: if a value does not fit its column, or an id is outside a static table.
        """
        encoded = self.encode(history, time, context or {}, user_id)
        items = self.encode_items(candidates, time)
        outputs, _ = self.run(*encoded, items, time)
        return {name: _prediction(outputs[name], task) for name, task in self.tasks.items()}

    def user_vector(
        self,
        history: Columns,
        time: int,
        *,
        context: Mapping[str, Any] | None = None,
        user_id: int = UNKNOWN_ID,
    ) -> Tensor:
        """Return (D,) what items are compared with. Arguments and errors: as `score`.

        Raises:
            ValueError: also if no event is before the time, or there is no retrieval head.
        """
        ints, codes, of_user = self.encode(history, time, context or {}, user_id)
        if not self.manifest["retrieval"]:
            raise ValueError("the model has no retrieval head: score candidates instead")
        if not len(ints):
            raise ValueError("the history is empty before the time: there is nothing to go by")
        _, vector = self.run(
            ints, codes, of_user, self.encode_items({ITEM_ID: [UNKNOWN_ID]}, time), time
        )
        assert vector is not None
        return vector

    def retrieve(
        self, vector_D: Tensor, k: int, exclude: Sequence[int] = ()
    ) -> tuple[Ints, NDArray[np.float32]]:
        """Return ids and scores of the k best items, exactly; of equal scores the smaller id first.

        Args:
            vector_D: of `user_vector`.
            k: at least 1.
            exclude: ids that must not be found.
        """
        ids, vectors_ED = self.catalogue()
        found = top_k(vector_D[None].float(), vectors_ED, min(k + len(exclude), max(1, len(ids))))
        rows = found.rows[0][found.rows[0] >= 0].numpy()
        is_free = ~np.isin(ids[rows], np.array(exclude, np.int64))
        scores = found.scores[0].numpy()[: len(rows)][is_free][:k]
        return ids[rows][is_free][:k], scores.astype(np.float32)

    def catalogue(self) -> tuple[Ints, Tensor]:
        """Return ids, ascending, and vectors of all items."""
        if self._catalogue is None:
            table = self.tables[self.table_of[ITEM_ID]]
            if table.ids == "dynamic":
                assert table.known_ids is not None
                assert table.known_rows is not None
                ids, rows = table.known_ids, torch.from_numpy(table.known_rows)
            else:
                ids = np.arange(len(table.rows) - 1)
                rows = torch.arange(1, len(table.rows))
            vectors = table.lookup(rows)
            if self.head.l2_normalize:
                vectors = functional.normalize(vectors, dim=-1, eps=NORM_EPS)
            self._catalogue = ids, vectors
        return self._catalogue

    def encode(
        self, history: Columns, time: int, context: Mapping[str, Any], user_id: int
    ) -> tuple[Ints, NDArray[np.uint8], Ints]:
        """Return ints (n, I), codes (n, S) and context (X,) of the events that will be read."""
        ints, codes = self._events(history)
        order = np.argsort(ints[:, TIMESTAMP], kind="stable")
        order = order[ints[order, TIMESTAMP] < time][-self.max_events :]
        columns = {USER_ID: pa.array([user_id])}
        for column in self.encoder.columns:
            if column.place == "context":
                value = context.get(column.name)
                columns[column.name] = _array(column.name, column.kind, [value])
        return ints[order], codes[order], self.encoder.encode_context(columns, 1)[0]

    def encode_items(self, items: Columns, time: int) -> Ints:
        """Return (m, I) encoded candidates."""
        num_items = len(items[ITEM_ID])
        return self._events({**items, EVENT_TIMESTAMP: [time] * num_items})[0]

    def run(
        self,
        ints: Ints,
        codes: NDArray[np.uint8],
        context: Ints,
        items: Ints,
        time: int,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the outputs of the ranking head and the user's vector, of encoded events."""
        num_events, num_items = len(ints), len(items)
        if num_items == 0:
            raise ValueError("candidates must not be empty")
        if num_items < LEAST_ITEMS:
            items = np.resize(items, (LEAST_ITEMS, items.shape[1]))
        arguments = (
            *self._rows(np.concatenate([ints, items]), context),
            torch.from_numpy(codes.astype(np.int64)),
            torch.from_numpy(ints[:, TIMESTAMP].copy()),
            torch.tensor(time),
        )
        program: Any = self._programs[min(num_events, 2)]
        if self._aot is not None and num_events >= 2:
            program = self._aot
        with torch.no_grad():
            outputs, vector = program(*arguments)
        has_vector = num_events > 0 and self.manifest["retrieval"]
        return {name: x[:num_items] for name, x in outputs.items()}, vector if has_vector else None

    def _rows(self, events: Ints, context: Ints) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return rows of the features with ids, and values of those with numbers."""
        rows: dict[str, Tensor] = {}
        numbers: dict[str, Tensor] = {}
        rows[ITEM_ID] = self._lookup(ITEM_ID, events[:, 0])
        for slots, values in (
            (self.encoder.item_slots, events),
            (self.encoder.context_slots, context[None]),
        ):
            for slot in slots:
                if slot.name not in self.manifest["inputs"]:
                    continue
                if slot.feature.is_number:
                    x = read_numbers(values, slot).astype(np.float32)
                    numbers[slot.name] = torch.from_numpy(x)
                else:
                    rows[slot.name] = self._lookup(slot.name, values[:, slot.first])
        return rows, numbers

    def _lookup(self, feature: str, ids: Ints) -> Tensor:
        table = self.tables[self.table_of[feature]]
        return table.lookup(table.rows_of(np.ascontiguousarray(ids), feature))

    def _events(self, given: Columns) -> tuple[Ints, NDArray[np.uint8]]:
        num_events = len(given[ITEM_ID]) if ITEM_ID in given else 0
        columns = {
            column.name: _array(
                column.name, column.kind, given.get(column.name, [None] * num_events), num_events
            )
            for column in self.encoder.columns
            if column.place == "events"
        }
        for name in (ITEM_ID, EVENT_TIMESTAMP):
            if columns[name].null_count:
                raise ValueError(f"{name} must be given for every event, got nulls")
        rows = self.encoder.encode(
            columns,
            columns[ITEM_ID].to_numpy(),
            np.zeros((num_events, self.encoder.num_context), np.int64),
            np.arange(num_events + 1),
        )
        codes = rows.codes.reshape(num_events, self.encoder.num_codes)[:, :-1]
        return rows.ints.reshape(num_events, self.encoder.num_ints), codes

    def _table(self, about: dict[str, Any]) -> ExportedTable:
        rows = torch.from_numpy(np.load(self.folder / about["file"]))
        if list(rows.shape) != about["shape"]:
            raise ValueError(
                f"{self.folder / about['file']} has shape {list(rows.shape)}, the manifest says "
                f"{about['shape']}: run gr export again"
            )
        ids = known = None
        if about["ids"] == "dynamic":
            with np.load(self.folder / about["map"]) as stored:
                ids, known = stored["ids"], stored["rows"]
        return ExportedTable(about["format"], rows, about["ids"], ids, known)


def _array(name: str, kind: str, values: Sequence[Any], length: int = 1) -> pa.Array:
    try:
        if kind in ("integer", "number"):
            as_kind = int if kind == "integer" else float
            values = [as_kind(x) if isinstance(x, bool) else x for x in values]
        array = pa.array(values, _TYPES[kind])
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise ValueError(f"column {name!r} must hold {kind} values: {error}") from error
    if len(array) != length:
        raise ValueError(f"column {name!r} must have {length} values, got {len(array)}")
    return array


def _prediction(output: Tensor, task: TaskConfig) -> NDArray[np.float32]:
    x = output.double().numpy()
    if task.type == "binary":
        return np.asarray(1 / (1 + np.exp(-x)), np.float32)
    x = np.expm1(np.minimum(x, 100)) if task.log1p else x
    x = np.minimum(x, task.maximum) if task.maximum > 0 else x
    return np.asarray(x * task.scale, np.float32)
