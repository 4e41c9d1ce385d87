"""An event log to a session-end log: one Ibis expression, run by DuckDB or Spark.

event log + starting history
  -> usable events (the others counted and written to rejects.parquet)
  -> joined columns -> string ids to 64 bits -> repeats dropped -> counters of the past
  -> sessions -> ordered by (partition, end_ts, user_id, session_id, time)
  -> nested, one row a session, one file a partition

Spark runs all of it but the last step. On one machine DuckDB's part ends before the sessions, and
before the repeats where no counter needs them dropped: session_cutter goes on, a partition at a
time, and asks DuckDB for the rest of the expression where one does not fit into memory.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import session_expression as steps
from pipelines.config import SessionizeConfig
from pipelines.counters import counter_names
from pipelines.duckdb_engine import DuckDBEngine, open_duckdb
from pipelines.event_log import IBIS_TYPES, Kind, Source, as_parquet, find_source
from pipelines.location import RemotePath, locate
from pipelines.manifest import LIST, Manifest, log_schema, read_manifest, write_manifest
from pipelines.output_folder import check_output, new_folder
from pipelines.schema import EVENT_ITEM_ID, EVENT_TIMESTAMP, history_name, part_name
from pipelines.session_cutter import CutRules, Dealer, write_cut
from pipelines.session_writer import WrittenFiles, write_partitions

if TYPE_CHECKING:
    import ibis.expr.types as ir

REJECTS = "rejects.parquet"
HELD_SHARE = 0.25  # of memory_gb that rows may take while DuckDB still runs

_IDS: frozenset[Kind] = frozenset({"integer", "string"})
_TIMES: frozenset[Kind] = frozenset({"integer", "timestamp"})
_NUMBERS: frozenset[Kind] = frozenset({"bool", "integer", "float"})
_VALUES: frozenset[Kind] = _NUMBERS | {"string", "integers", "strings"}
_ANY: frozenset[Kind] = _NUMBERS | {"string", "timestamp"}
_ARROW_TYPES: dict[Kind, str] = {
    "bool": "bool",
    "integer": "int64",
    "float": "double",
    "string": "int64",
    "integers": LIST,
    "strings": LIST,
}


class Engine(Protocol):
    """What runs the expression."""

    def read(self, source: Source, name: str) -> "ir.Table":
        """Return the columns of a source as raw_NAME, with `file` (index) and `row` (in the file).

        Bools and strings are as they are, integers int64, floats float64 with NaN as null,
        timestamps int64 us.
        """

    def hex_to_integer(self, digits: "ir.StringValue") -> "ir.IntegerValue":
        """Return the int64 that 8 hexadecimal digits stand for."""

    def collect(self, table: "ir.Table") -> pa.Table:
        """Return all rows of an expression that has few."""

    def stream(self, table: "ir.Table") -> Iterator[pa.RecordBatch]:
        """Return the rows of an ordered expression."""


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The files that are read, and what the log takes from them."""

    log: Source
    history: Source | None
    joins: tuple[Source, ...]
    kinds: dict[str, Kind]
    """Kind of each column of the event log and of each joined one."""
    features: tuple[str, ...]
    """Event columns beside the actions, counters left out."""
    context: tuple[str, ...]
    """Context columns."""

    def as_parquet(self, folder: Path) -> "_Inputs":
        """Return the same with files that are not Parquet copied to such in `folder`."""
        return replace(
            self,
            log=as_parquet(self.log, folder),
            history=self.history and as_parquet(self.history, folder),
            joins=tuple(as_parquet(source, folder) for source in self.joins),
        )


def sessionize(config: SessionizeConfig) -> Manifest:
    """Write the session-end log of an event log.

    The output appears complete or not at all.

    Args:
        config: what is read, how, and where the result goes; relative paths start at the working
            folder.

    Returns:
        The manifest of the log that was written.

    Raises:
        ValueError: if the configuration contradicts itself or the files, a file or column is
            missing, a joined file repeats a key or matches nothing, the log is empty, too many
            events are unusable, `output` exists and may not be replaced, or memory_gb too small.
    """
    _check_names(config)
    _check_timezone(config.timezone)
    output = locate(config.output)
    if isinstance(output, RemotePath) and config.engine == "spark":
        raise ValueError(
            f"output={config.output}: Spark's workers need a folder that they share with the "
            "driver: give engine=spark a path, and copy the log from there"
        )
    check_output(output, config.overwrite)
    inputs = _find_inputs(config)
    with new_folder(output) as (folder, scratch):
        inputs = inputs.as_parquet(scratch)
        with _engine(config, scratch) as engine:
            manifest = _write(config, inputs, engine, folder)
        write_manifest(manifest)
    return read_manifest(output)


def _write(config: SessionizeConfig, inputs: _Inputs, engine: Engine, folder: Path) -> Manifest:
    rows = steps.with_time_and_reason(_read_rows(inputs, engine), config, inputs.kinds)
    num_rows, rejects = _count(rows, config, inputs, engine, folder)
    events = rows.filter(rows["reason"].isnull())
    for index, (join, source) in enumerate(zip(config.joins, inputs.joins, strict=True)):
        right = engine.read(source, f"join_{index}")
        _check_unique(engine, right, join.right_key or join.key, source)
        events = steps.with_join(events, join, right)
    event_columns = (*config.actions, *inputs.features)
    events = steps.with_ids(
        events, config, inputs.kinds, event_columns, inputs.context, engine.hex_to_integer
    )
    actions, features, context = _columns(config, inputs)
    write = partial(_write_source, config, engine, folder, log_schema(actions, features, context))
    log = write(events, steps.LOG, part_name)
    past = WrittenFiles()
    if inputs.history is not None:
        past = write(events, steps.HISTORY, history_name)
    num_events = sum(file.num_events for file in (*log.files, *past.files))
    manifest = Manifest(
        folder=folder,
        partitions=config.partitions,
        partition_seed=config.partition_seed,
        timezone=config.timezone,
        actions=actions,
        features=features,
        context=context,
        parts=tuple(log.files),
        histories=tuple(past.files),
        start_ts=log.start_ts,
        end_ts=log.end_ts,
        num_rows_read=num_rows,
        num_duplicates=num_rows - sum(rejects.values()) - num_events,
        rejects=rejects,
        nulls=log.nulls,
        config=asdict(config),
    )
    _check_joins(config, inputs, manifest)
    return manifest


def _write_source(
    config: SessionizeConfig,
    engine: Engine,
    folder: Path,
    schema: pa.Schema,
    events: "ir.Table",
    source: int,
    file_name: Callable[[int], str],
) -> WrittenFiles:
    """Write the sessions of the log, or the users' histories before it, one file a partition."""
    counters = steps.with_counters if source == steps.LOG else steps.without_counters
    sessions = steps.in_sessions if source == steps.LOG else steps.as_histories
    seed = config.partition_seed

    def in_order(rows: "ir.Table") -> Iterator[pa.RecordBatch]:
        return engine.stream(steps.in_order(sessions(rows, config), config))

    if not isinstance(engine, DuckDBEngine):
        rows = counters(steps.without_repeats(events, config), config)
        return write_partitions(
            in_order(rows),
            folder,
            schema,
            partitions=config.partitions,
            seed=seed,
            file_name=file_name,
        )

    # Counters see all events, so repeats must be gone before.
    drops_repeats = source == steps.LOG and bool(config.counters)
    if drops_repeats:
        events = steps.without_repeats(events, config)
    max_bytes = config.memory_gb * 1e9
    dealer = Dealer(config.partitions, engine.new_folder(), max_bytes * HELD_SHARE)
    for batch in engine.stream(steps.in_partitions(counters(events, config), config)):
        dealer.add(batch)

    def in_order_again(files: Sequence[Path]) -> Iterator[pa.RecordBatch]:
        rows = steps.from_partitions(engine.read_rows(files), config, source)
        return in_order(rows if drops_repeats else steps.without_repeats(rows, config))

    return write_cut(
        dealer,
        CutRules(
            gap_seconds=config.gap_seconds,
            duplicates="keep" if drops_repeats else config.duplicates,
            session=None if source == steps.LOG else steps.HISTORY_SESSION,
        ),
        folder,
        schema,
        seed=seed,
        file_name=file_name,
        threads=config.threads or os.cpu_count() or 1,
        max_bytes=max_bytes,
        in_order=in_order_again,
    )


def _columns(
    config: SessionizeConfig, inputs: _Inputs
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Return name -> Arrow type of the actions, the further event columns and the context."""

    def types(names: tuple[str, ...]) -> dict[str, str]:
        return {
            name: LIST if name in config.split else _ARROW_TYPES[inputs.kinds[name]]
            for name in names
        }

    counters = [name for x, y in config.counters.items() for name in counter_names(x, y)]
    features = types(inputs.features) | dict.fromkeys(counters, "float")
    return types(config.actions), features, types(inputs.context)


def _check_names(config: SessionizeConfig) -> None:
    """Refuse two columns of one name and counters of columns that are not there."""
    if not config.actions:
        raise ValueError("actions is empty: name at least one action column of the event log")
    joined = {name: i for i, join in enumerate(config.joins) for name in join.columns}
    event = [EVENT_ITEM_ID, EVENT_TIMESTAMP, *config.actions, *config.features]
    context = list(config.context)
    for join in config.joins:
        (event if join.into == "event" else context).extend(join.columns)
        if not join.columns:
            raise ValueError(f"join of {join.path} adds nothing: name its columns")
    keys = {config.user_id, config.item_id, *event[2:]}
    for prefix, counter in config.counters.items():
        event.extend(counter_names(prefix, counter))
        for setting, names, known in (
            ("keys", counter.keys, keys),
            ("actions", counter.actions, set(config.actions)),
            ("known", counter.known, set(config.actions)),
        ):
            unknown = sorted(set(names) - known)
            if unknown:
                raise ValueError(
                    f"counters.{prefix}.{setting} names {unknown}, expected some of {sorted(known)}"
                )
    raw = [*config.actions, *config.features, *config.context]
    raw += [config.user_id, config.item_id, config.timestamp]
    values = {*config.features, *config.context, *joined}
    for name, delimiter in config.split.items():
        if name not in values or not delimiter:
            raise ValueError(
                f"split.{name}={delimiter!r}: expected a column of features, context or joins "
                f"({sorted(values)}) and the text between its values, such as '|'"
            )
    clash = sorted(set(joined) & set(raw))
    if clash:
        raise ValueError(f"joins add column(s) {clash} that the event log has: choose other names")
    for what, columns in (("event", event), ("context", context), ("joined", list(joined))):
        seen: set[str] = set()
        for name in columns:
            if name.lower() in seen:
                raise ValueError(
                    f"two {what} columns are named {name} (capitals do not count): rename one in "
                    "actions, features, context, joins or counters"
                )
            seen.add(name.lower())


def _check_timezone(name: str) -> None:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ValueError(
            f"timezone={name} is not known; expected an IANA name such as UTC or Asia/Shanghai"
        ) from error


def _find_inputs(config: SessionizeConfig) -> _Inputs:
    """Find all files and check their columns before anything is computed."""
    added = {name for join in config.joins for name in join.columns}
    columns = {config.user_id: _IDS, config.item_id: _IDS, config.timestamp: _TIMES}
    wanted = [
        *((name, _NUMBERS) for name in config.actions),
        *((name, _VALUES) for name in (*config.features, *config.context)),
        *((join.key, _IDS) for join in config.joins if join.key not in added),
        *([(config.session_id, _IDS)] if config.session_id else []),
        *([(config.order, _ANY)] if config.order else []),
    ]
    for name, allowed in wanted:
        columns[name] = columns.get(name, allowed) & allowed
    log = find_source(config.input, "input", columns)
    history = None
    if config.history:
        others = [x for x in columns if x not in (config.user_id, config.item_id, config.timestamp)]
        history = find_source(config.history, "history", columns, optional=others)
        for name, kind in history.kinds.items():
            if kind != log.kinds[name]:
                raise ValueError(
                    f"column {name} is {kind} in history={config.history} but {log.kinds[name]} in "
                    f"input={config.input}: cast one of them"
                )
    kinds = dict(log.kinds)
    joins = []
    for index, join in enumerate(config.joins):
        if join.key not in kinds:
            raise ValueError(
                f"joins.{index}.key={join.key} is neither a column of the event log nor of an "
                f"earlier join; they have {sorted(kinds)}"
            )
        right_key = join.right_key or join.key
        right = dict.fromkeys(join.columns.values(), _VALUES) | {right_key: _IDS}
        source = find_source(join.path, f"joins.{index}.path", right)
        if source.kinds[right_key] != kinds[join.key]:
            raise ValueError(
                f"joins.{index}: column {right_key} of {join.path} is {source.kinds[right_key]}, "
                f"but column {join.key} of the events is {kinds[join.key]}: cast one of them"
            )
        kinds.update({new: source.kinds[old] for new, old in join.columns.items()})
        joins.append(source)
    for name in config.split:
        if kinds[name] != "string":
            raise ValueError(
                f"split.{name}: expected a column of text, found {kinds[name]}: leave it out"
            )
    keys = {key for counter in config.counters.values() for key in counter.keys}
    lists = sorted(x for x in keys if x in config.split or kinds.get(x) in ("integers", "strings"))
    if lists:
        raise ValueError(
            f"counters have keys {lists} that hold lists: a counter counts by single values"
        )
    features, context = list(config.features), list(config.context)
    for join in config.joins:
        (features if join.into == "event" else context).extend(join.columns)
    return _Inputs(log, history, tuple(joins), kinds, tuple(features), tuple(context))


def _read_rows(inputs: _Inputs, engine: Engine) -> "ir.Table":
    """Return the rows of log and history, columns that the history lacks as nulls."""
    import ibis

    log = engine.read(inputs.log, "log").mutate(source=steps.LOG)
    if inputs.history is None:
        return log
    history = engine.read(inputs.history, "history").mutate(source=steps.HISTORY)
    lacking = {
        "raw_" + name: ibis.null(IBIS_TYPES[kind])
        for name, kind in inputs.log.kinds.items()
        if name not in inputs.history.kinds
    }
    return log.union(history.mutate(**lacking).select(*log.columns))


def _count(
    rows: "ir.Table", config: SessionizeConfig, inputs: _Inputs, engine: Engine, folder: Path
) -> tuple[int, dict[str, int]]:
    """Return the number of rows and of unusable ones by reason, and write the latter to a file."""
    counts = rows.group_by(["source", "reason"]).agg(n=rows.count())
    found = engine.collect(counts.order_by(["source", "reason"])).to_pylist()
    if not any(x["n"] for x in found if x["source"] == steps.LOG):
        raise ValueError(f"input={config.input} is empty: it has no row")
    rejects: dict[str, int] = {}
    for x in found:
        if x["reason"] is not None:
            rejects[x["reason"]] = rejects.get(x["reason"], 0) + x["n"]
    num_rows, num_rejects = sum(x["n"] for x in found), sum(rejects.values())
    usable = sum(x["n"] for x in found if x["source"] == steps.LOG and x["reason"] is None)
    if num_rejects:
        bad = rows.filter(rows["reason"].notnull())
        place = ["source", "file", "row"]
        names = dict.fromkeys((config.user_id, config.item_id, config.timestamp))
        bad = bad.select(*place, "reason", **{name: bad["raw_" + name] for name in names})
        bad = bad.order_by(place)
        if num_rejects > config.max_reject_fraction * num_rows or not usable:
            first = engine.collect(bad.limit(1)).to_pylist()[0]
            raise ValueError(
                f"{num_rejects} of {num_rows} events are unusable, more than max_reject_fraction="
                f"{config.max_reject_fraction} allows: {rejects}. The first is row {first['row']} "
                f"of {_file_of(inputs, first)}: {first['reason']}. Repair the log, or raise "
                "max_reject_fraction."
            )
        _write_rejects(engine, bad, inputs, folder / REJECTS)
    return num_rows, rejects


def _file_of(inputs: _Inputs, row: dict[str, Any]) -> str:
    source = inputs.log if row["source"] == steps.LOG else inputs.history
    assert source is not None
    name: str = source.names[row["file"]]
    return name


def _write_rejects(engine: Engine, bad: "ir.Table", inputs: _Inputs, path: Path) -> None:
    """Write the unusable rows: reason, file, row in the file, user, item and time as read."""
    table = engine.collect(bad)
    files = [_file_of(inputs, row) for row in table.select(["source", "file"]).to_pylist()]
    table = table.drop_columns(["source", "file"]).add_column(
        1, "file", pa.array(files, pa.string())
    )
    pq.write_table(table, path)


def _check_unique(engine: Engine, right: "ir.Table", key: str, source: Source) -> None:
    keys = right.select(key=right["raw_" + key])
    keys = keys.filter(keys["key"].notnull())
    counts = keys.group_by("key").agg(n=keys.count())
    repeated = engine.collect(counts.filter(counts["n"] > 1).order_by("key").limit(1)).to_pylist()
    if repeated:
        raise ValueError(
            f"{source.setting}={', '.join(source.names)}: {key}={repeated[0]['key']} stands in "
            f"{repeated[0]['n']} rows, expected one row a key: drop the others"
        )


def _check_joins(config: SessionizeConfig, inputs: _Inputs, manifest: Manifest) -> None:
    """Refuse a join that matched nothing: its key is likely not the one meant."""
    for index, (join, source) in enumerate(zip(config.joins, inputs.joins, strict=True)):
        rows = manifest.num_events if join.into == "event" else manifest.num_sessions
        if all(manifest.nulls[name] == rows for name in join.columns):
            raise ValueError(
                f"joins.{index}: all columns are null for every {join.into}: no {join.key} of the "
                f"log has a value in column {join.right_key or join.key} of "
                f"{', '.join(source.names)}. Check key and right_key, or drop the join."
            )


@contextmanager
def _engine(config: SessionizeConfig, scratch: Path) -> Iterator[Engine]:
    """Yield what runs the expression."""
    if config.engine == "spark":
        from pipelines.spark_engine import open_spark

        with open_spark(config, scratch) as engine:
            yield engine
        return
    with open_duckdb(config, scratch) as engine:
        yield engine
