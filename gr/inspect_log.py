"""What a person wants to see of a session-end log before training: text, plots, a few sequences."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from gr.atomic import write_atomically
from gr.inspect_plots import draw_log
from gr.report import markdown_table
from gr.tokens import carries_item, context_tokens
from pipelines.batch import SequenceBatch, TokenKind
from pipelines.config import ActionConfig, DataConfig, StochasticLengthConfig, bag_features
from pipelines.inspection import LogStatistics, expected_tokens, inspect_log
from pipelines.manifest import Manifest, read_manifest
from pipelines.stream import SessionStream

ALPHAS = (1.6, 1.7, 1.8, 1.9)
_TOKENS_SHOWN = 24


def inspect(
    log: str | Path,
    output: str | Path,
    *,
    data: DataConfig | None = None,
    num_sequences: int = 3,
    seed: int = 0,
) -> str:
    """Describe a log; write the description and plots.

    Args:
        log: folder of a session-end log.
        output: folder of inspect.md, lengths.png, times.png and actions.png.
        data: how the log becomes sequences; None means all action columns as flags, interleaved.
        num_sequences: sequences that are printed as tokens.
        seed: of the stream.

    Returns:
        The description, in Markdown.

    Raises:
        ValueError: if the log cannot be read, or lacks a column that `data` needs.
    """
    manifest = read_manifest(log)
    if data is None:
        data = DataConfig(
            log=str(log),
            num_items=1,
            actions={name: ActionConfig() for name in manifest.actions},
        )
    data = replace(data, log=str(log), prefetch=0)
    zone = ZoneInfo(manifest.timezone)
    offset = datetime.fromtimestamp(manifest.start_ts, zone).utcoffset()
    assert offset is not None
    found = inspect_log(manifest, day_offset_seconds=int(offset.total_seconds()))
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = _token_table(found, data)
    plots = draw_log(found, tokens, manifest, folder)
    sequences = "\n\n".join(_sequences(data, num_sequences, seed, zone))
    sections = [
        f"# {log}\n\n{_counts(found, manifest, zone)}",
        f"## Columns\n\n{_columns(manifest)}",
        f"## Actions\n\n{_actions(found)}",
        f"## Lengths\n\n{_lengths(found)}",
        f"## Tokens\n\n{_tokens(tokens, data)}",
        f"## Sequences\n\n{sequences}",
    ]
    text = "\n\n".join(sections)
    images = "".join(f"\n![{path.stem}]({path.name})\n" for path in plots)
    write_atomically(folder / "inspect.md", f"{text}\n{images}")
    return f"{text}\n\nWritten to {folder}: inspect.md, {', '.join(p.name for p in plots)}"


def _counts(found: LogStatistics, manifest: Manifest, zone: ZoneInfo) -> str:
    first, last = (
        datetime.fromtimestamp(ts, zone).strftime("%Y-%m-%d %H:%M:%S")
        for ts in (manifest.start_ts, manifest.end_ts)
    )
    rows = [
        ["sessions", f"{found.num_sessions:,}"],
        ["events", f"{found.num_events:,}"],
        ["events of starting histories", f"{found.num_history_events:,}"],
        ["users with a session", f"{found.num_users:,}"],
        ["items", f"{found.num_items:,} (largest id {found.max_item_id:,})"],
        ["from", f"{first} {manifest.timezone}"],
        ["to", f"{last} {manifest.timezone}"],
        ["partitions", f"{manifest.partitions}"],
        ["rows read; repeats dropped", f"{manifest.num_rows_read:,}; {manifest.num_duplicates:,}"],
        ["rows rejected", str(manifest.rejects or 0)],
    ]
    return markdown_table(["what", "number"], rows)


def _columns(manifest: Manifest) -> str:
    groups = {"action": manifest.actions, "event": manifest.features, "context": manifest.context}
    rows = []
    for group, columns in groups.items():
        total = manifest.num_sessions if group == "context" else manifest.num_events
        for name, kind in columns.items():
            share = manifest.nulls.get(name, 0) / max(total, 1)
            rows.append([name, group, kind, f"{share:.2%}"])
    return markdown_table(["column", "of", "type", "null"], rows)


def _actions(found: LogStatistics) -> str:
    rows = [
        [
            name,
            f"{a.known / max(found.num_events, 1):.2%}",
            f"{a.positive / a.known:.2%}" if a.known else "-",
            *(f"{x:.6g}" if a.known else "-" for x in (a.total / max(a.known, 1), a.least, a.most)),
        ]
        for name, a in found.actions.items()
    ]
    return markdown_table(["action", "known", "above 0", "mean", "least", "most"], rows)


def _lengths(found: LogStatistics) -> str:
    rows = []
    for name, counts in (
        ("events a session", found.session_lengths),
        ("events a user, history included", found.user_lengths),
    ):
        values, weights = _sorted(counts)
        total = weights.sum()
        marks = np.searchsorted(np.cumsum(weights), np.array([0.5, 0.9, 0.99]) * total)
        mean = (values * weights).sum() / max(total, 1)
        shown = [f"{values[min(i, len(values) - 1)]:,}" for i in marks] if total else ["-"] * 3
        most = f"{values[-1]:,}" if total else "-"
        rows.append([name, f"{mean:.2f}", *shown, most])
    return markdown_table(["", "mean", "50 %", "90 %", "99 %", "most"], rows)


def _sorted(counts: Mapping[int, int]) -> tuple[Any, Any]:
    values = np.array(sorted(counts), np.int64)
    return values, np.array([counts[v] for v in values.tolist()], np.int64)


def _token_table(found: LogStatistics, data: DataConfig) -> dict[float, tuple[Any, Any]]:
    """Return alpha (0: whole sequences) -> (expected tokens, sessions) of the examples."""
    pairs = np.array(list(found.examples), np.int64).reshape(-1, 2)
    sessions = np.array(list(found.examples.values()), np.int64)
    per_event = 2 if data.layout == "interleaved" else 1
    table = {}
    for alpha in (0.0, *ALPHAS):
        tokens = expected_tokens(
            pairs[:, 0],
            pairs[:, 1],
            per_event=per_event,
            max_history_tokens=data.max_history_tokens,
            alpha=alpha if data.max_history_tokens else 0.0,
        )
        table[alpha] = (tokens, sessions)
    return table


def _tokens(table: Mapping[float, tuple[Any, Any]], data: DataConfig) -> str:
    rows = []
    whole = 0.0
    for alpha, (tokens, sessions) in table.items():
        mean = float((tokens * sessions).sum() / max(sessions.sum(), 1))
        whole = whole or mean
        name = f"alpha {alpha}" if alpha else "whole"
        rows.append([name, f"{mean:.1f}", f"{1 - mean / whole:.1%}" if whole else "-"])
    head = (
        f"Expected tokens of an example, layout {data.layout}, data.max_history_tokens="
        f"{data.max_history_tokens} (also N_c of stochastic length); context tokens not counted."
        "\n\n"
    )
    return head + markdown_table(["stochastic length", "mean tokens", "dropped"], rows)


def _sequences(data: DataConfig, number: int, seed: int, zone: ZoneInfo) -> Iterator[str]:
    """Yield the first sequences that have a history, else the first ones, as tokens."""
    plain = replace(data, stochastic_length=StochasticLengthConfig())
    spare: list[str] = []
    shown = 0
    for step, batch in enumerate(SessionStream(plain, seed=seed)):
        for b in range(batch.num_sequences):
            if shown == number:
                return
            has_history = int(batch.session_start[b]) > batch.num_context
            if has_history:
                shown += 1
                yield _sequence(batch, b, data, zone)
            elif len(spare) < number:
                spare.append(_sequence(batch, b, data, zone))
        if step == 50:
            break
    yield from spare[: number - shown]


def _features(batch: SequenceBatch, b: int, data: DataConfig) -> list[list[str]]:
    """Return "name=value" of each feature of each token of a sequence."""
    first, last = (int(x) for x in batch.offsets[b : b + 2])
    shown: list[list[str]] = [[] for _ in range(first, last)]
    carries = carries_item(batch.token_kind)
    items = carries.nonzero()[:, 0]
    places = dict.fromkeys(("item_id", *data.item_features), items)
    if data.context != "none":
        for index, name in enumerate(data.context_features):
            places[name] = context_tokens(batch, index, name)
    for name, tokens in places.items():
        rows = [j for j, t in enumerate(tokens.tolist()) if first <= t < last]
        for j in rows:
            token = int(tokens[j])
            if name in bag_features(data):
                assert batch.bags is not None
                value = str(batch.bags[name].to_dense()[token].tolist())
            elif name in batch.numbers:
                value = f"{float(batch.numbers[name][j]):.4g}"
            else:
                value = str(int(batch.ids[name].values()[j]))
            shown[token - first].append(f"{name}={value}")
    return shown


def _sequence(batch: SequenceBatch, b: int, data: DataConfig, zone: ZoneInfo) -> str:
    """Return the newest tokens of a sequence, a line each; > marks those of the session."""
    first, last = (int(x) for x in batch.offsets[b : b + 2])
    kinds = [TokenKind(k) for k in batch.token_kind[first:last].tolist()]
    action_kinds = (TokenKind.ACTION, TokenKind.EVENT)
    features = _features(batch, b, data)
    before = batch.token_kind[:first]
    action = int(((before == TokenKind.ACTION) | (before == TokenKind.EVENT)).sum())
    ranked = {int(p) - first: j for j, p in enumerate(batch.ranking_positions)}
    lines = []
    for i, kind in enumerate(kinds):
        parts = list(features[i])
        if kind in action_kinds:
            codes = batch.action_codes[action].tolist()
            parts += [f"{name}:{code}" for name, code in zip(data.actions, codes, strict=True)]
            action += 1
        if i in ranked:
            parts += [
                f"label {task}={float(batch.labels[task][ranked[i]]):.4g}"
                for task in data.tasks
                if float(batch.weights[task][ranked[i]])
            ]
        when = datetime.fromtimestamp(int(batch.timestamp[first + i]), zone)
        mark = ">" if i >= int(batch.session_start[b]) else " "
        lines.append(f"{mark} {when:%Y-%m-%d %H:%M:%S} {kind.name:9} {' '.join(parts)}")
    left_out = max(0, len(lines) - _TOKENS_SHOWN)
    head = (
        f"user {int(batch.user_id[b])}, session {int(batch.session_id[b])}: {len(lines)} tokens"
        + (f", the first {left_out} not shown" if left_out else "")
    )
    return "\n".join([head, "```", *lines[left_out:], "```"])
