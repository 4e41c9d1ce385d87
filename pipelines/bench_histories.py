"""Log to batches, and what histories cost: python -m pipelines.bench_histories FOLDER [EVENTS].

One core: run it under `taskset -c 0`. Rates are of CPU time: the machine may be shared. EVENTS
(default 10 million) is the size of the stream of the memory and snapshot measurements, with a user
for each 100 events.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines.bench import four_columns, measure, quickstart_like, write_synthetic_log
from pipelines.config import DataConfig, FeatureConfig
from pipelines.features import EventEncoder
from pipelines.history import EventRows, HistoryStore, Rules, SessionRows
from pipelines.reader import read_blocks
from pipelines.schema import part_name
from pipelines.snapshot import Standing, read_snapshot, write_snapshot

# Name -> sessions and users of a log whose sessions have 8 events on average.
LOGS = {"long": (62_500, 250), "short": (120_000, 28_000)}
RIVAL_SESSIONS = {"pandas loop": 2_000, "numpy dict": 20_000}
KEPT = 512
FADES = FeatureConfig(counter="user", half_life_hours=24.0, encoding="zscore")
REPEATS = 5


def write_logs(folder: Path) -> None:
    """Write the logs that are not there yet, one partition each."""
    for name, (sessions, users) in LOGS.items():
        for four in (True, False):
            path = folder / f"{name}-{4 if four else 34}"
            if not path.exists():
                write_synthetic_log(
                    path,
                    partitions=1,
                    sessions=sessions if four else sessions // 3,
                    users=users if four else users // 3,
                    mean_events=8.0,
                    history=0,
                    four_columns=four,
                )


def best(run: Callable[[], float]) -> float:
    """Return the least of a few results."""
    return min(run() for _ in range(REPEATS))


def throughput(folder: Path) -> None:
    """Print tokens a second of the stream, beside reading alone and the obvious loops."""
    batch = {"long": 128, "short": 2048}
    for name in LOGS:
        four = folder / f"{name}-4"
        configs = {
            "four columns": four_columns(four, prefetch=0, sessions_per_partition=batch[name]),
            "quickstart's features": quickstart_like(
                folder / f"{name}-34",
                prefetch=0,
                max_history_tokens=2 * KEPT,
                sessions_per_partition=batch[name],
            ),
            "four columns and a counter of the user": four_columns(
                four,
                prefetch=0,
                sessions_per_partition=batch[name],
                item_features={"fades": FADES},
            ),
        }
        for label, config in configs.items():
            result = min(
                (measure(config, time.process_time) for _ in range(REPEATS)),
                key=lambda m: m["seconds"],
            )
            sequences = result["sequences"]
            decode, encode = best(partial(decoded, config)), best(partial(read, config))
            beyond = (result["seconds"] - decode) / sequences * 1e6
            print(
                f"{name}, {label}: {result['tokens_per_s'] / 1e6:.1f} M tokens/s, "
                f"{result['us_per_sequence']:.2f} us a session of "
                f"{result['tokens'] / sequences:.0f} tokens; Arrow's decoding alone "
                f"{decode / sequences * 1e6:.2f}, with checks and encoding "
                f"{encode / sequences * 1e6:.2f}; beyond decoding {beyond:.2f}"
            )
        for label, rival in (("pandas loop", pandas_loop), ("numpy dict", numpy_dict)):
            table = pq.read_table(four / part_name(0))
            few = table.slice(table.num_rows - RIVAL_SESSIONS[label])
            before = table.slice(0, len(table) - len(few))
            seconds, tokens = rival(before, few)
            print(
                f"{name}, {label}: {tokens / seconds / 1e6:.3f} M tokens/s, "
                f"{seconds / len(few) * 1e6:.0f} us a session of {tokens / len(few):.0f} tokens"
            )


def decoded(config: DataConfig) -> float:
    """Return the seconds in which Arrow decodes the columns that the configuration needs."""
    names = {column.name for column in EventEncoder(config).columns}
    start = time.process_time()
    with pq.ParquetFile(Path(config.log) / part_name(0), memory_map=True) as file:
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        wanted = [x for x in leaves if x.split(".")[-1] in names or "." not in x]
        for _ in file.iter_batches(4096, columns=wanted, use_threads=False):
            pass
    return time.process_time() - start


def read(config: DataConfig) -> float:
    """Return the seconds in which the sessions are decoded, checked and encoded."""
    encoder = EventEncoder(config)
    start = time.process_time()
    for _ in read_blocks(Path(config.log) / part_name(0), encoder, rows_per_block=4096):
        pass
    return time.process_time() - start


def _columns(table: pa.Table) -> tuple[list[Any], list[Any]]:
    """Return user, start and offsets of sessions; item, time and actions of events."""
    events = table["events"].combine_chunks()
    offsets = events.offsets.to_numpy() - events.offsets[0].as_py()
    flat = events.flatten()
    names = [field.name for field in flat.type]
    sessions = [table["user_id"].to_numpy(), table["start_ts"].to_numpy(), offsets]
    return sessions, [flat.field(name).to_numpy() for name in names]


def pandas_loop(before: pa.Table, few: pa.Table) -> tuple[float, int]:
    """The obvious loop: a data frame of each user, concat and tail; batches of 128."""
    (users, _, offsets), columns = _columns(before)
    frame = pd.DataFrame(dict(zip("itas", columns, strict=True)))
    frame["user"] = np.repeat(users, np.diff(offsets))
    held = {user: x.drop(columns="user").tail(KEPT) for user, x in frame.groupby("user")}
    sessions = few.to_pandas()
    start, tokens, batch = time.process_time(), 0, []
    for row in sessions.itertuples(index=False):
        new = pd.DataFrame(list(row.events)).set_axis(list("itas"), axis=1)
        old = held.get(row.user_id)
        both = new
        if old is not None:
            both = pd.concat([old[old.t < row.start_ts].tail(KEPT), new])
        batch.append([both[c].to_numpy() for c in "itas"])
        tokens += len(both)
        held[row.user_id] = new if old is None else pd.concat([old, new]).tail(KEPT)
        if len(batch) == 128:
            [np.concatenate([b[i] for b in batch]) for i in range(4)]
            batch = []
    return time.process_time() - start, tokens


def numpy_dict(before: pa.Table, few: pa.Table) -> tuple[float, int]:
    """A good loop: a tuple of arrays of each user, searchsorted and concatenate."""
    held: dict[int, list[Any]] = {}

    def pass_over(table: pa.Table) -> int:
        (users, starts, offsets), columns = _columns(table)
        tokens, batch = 0, []
        for i, user in enumerate(users.tolist()):
            new = [c[offsets[i] : offsets[i + 1]] for c in columns]
            old = held.get(user)
            both = new
            if old is not None:
                n = np.searchsorted(old[1], starts[i])
                both = [
                    np.concatenate([a[max(0, n - KEPT) : n], b])
                    for a, b in zip(old, new, strict=True)
                ]
                held[user] = [
                    np.concatenate([a, b])[-KEPT - 64 :] for a, b in zip(old, new, strict=True)
                ]
            else:
                held[user] = new
            batch.append(both)
            tokens += len(both[0])
            if len(batch) == 128:
                [np.concatenate([b[i] for b in batch]) for i in range(4)]
                batch = []
        return tokens

    pass_over(before)
    start = time.process_time()
    tokens = pass_over(few)
    return time.process_time() - start, tokens


def drawn_blocks(num_events: int) -> Iterator[tuple[SessionRows, EventRows]]:
    """Yield a stream of sessions, geometric with mean 8, of users drawn by a power law."""
    rng = np.random.default_rng(0)
    num_users, size, clock = max(1, num_events // 100), 16_384, 0
    weights = (np.arange(num_users) + 10.0) ** -0.5
    chances = np.cumsum(weights / weights.sum())
    for _ in range(-(-num_events // (8 * size))):
        lengths = rng.geometric(1 / 8, size)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        times = clock + np.arange(offsets[-1])
        clock += int(offsets[-1])
        ints = np.stack([rng.integers(0, 1 << 40, len(times)), times], axis=1)
        yield (
            SessionRows(
                user_id=np.searchsorted(chances, rng.random(size)) * 7919,
                session_id=np.arange(size),
                start_ts=times[offsets[:-1]],
                offsets=offsets,
                reason=np.zeros(size, np.uint8),
                context=np.zeros((size, 0), np.int64),
                first_piece=np.zeros(size, np.int64),
            ),
            EventRows(
                ints.reshape(-1),
                np.empty(0, np.float32),
                rng.integers(0, 4, 3 * len(times)).astype(np.uint8),
            ),
        )


def memory_and_snapshot(folder: Path, num_events: int) -> None:
    """Print bytes of histories against those of the events they hold; seconds of a snapshot."""
    rules = Rules(
        seed=0,
        purpose=2,
        max_events=256,
        keep=256,
        extra=32,
        max_session_events=256,
        sampled_rate=float("inf"),
        supervise_history=False,
        num_ints=2,
        num_floats=0,
        num_kept_floats=0,
        num_codes=3,
    )
    resident = _resident_bytes()
    store, extending, total = HistoryStore(rules), 0.0, 0
    for sessions, events in drawn_blocks(num_events):
        start = time.process_time()
        store.extend(sessions, events, 0, len(sessions.user_id))
        extending += time.process_time() - start
        total += int(sessions.offsets[-1])
    resident = _resident_bytes() - resident
    num_users = store.num_users
    lengths = store.arena.length[:num_users]
    raw = int(np.minimum(lengths, rules.keep).sum()) * 19
    bound = 1.3 * raw + 40 * num_users
    print(
        f"histories of {total:,} events, {num_users:,} users: {raw:,} bytes raw, "
        f"{store.num_bytes:,} held ({store.num_bytes / raw:.2f}x; 1.3x + 40 B a user would be "
        f"{bound:,.0f}), {resident:,} resident; {total / extending / 1e6:.1f} M events/s appended"
    )
    path, here = folder / "histories.arrow", Standing(0, 0, {}, "", ())
    for _ in range(3):
        start, used = time.perf_counter(), time.process_time()
        write_snapshot(path, store, here)
        written, writing = time.perf_counter() - start, time.process_time() - used
        size = path.stat().st_size / 1e9
        start = time.perf_counter()
        _write_plainly(folder / "plain", path.stat().st_size)
        plain = time.perf_counter() - start
        start, used = time.perf_counter(), time.process_time()
        read_snapshot(path, HistoryStore(rules), here)
        restored, restoring = time.perf_counter() - start, time.process_time() - used
        print(
            f"snapshot of {size:.2f} GB: {written / size:.2f} s/GB (CPU {writing / size:.2f}; as "
            f"many zeros written and synced to the same disk: {plain / size:.2f}), restored "
            f"{restored / size:.2f} s/GB (CPU {restoring / size:.2f})"
        )
    path.unlink()


def _write_plainly(path: Path, num_bytes: int) -> None:
    block = bytes(1 << 22)
    with path.open("wb") as file:
        for _ in range(-(-num_bytes // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    write_logs(root)
    throughput(root)
    memory_and_snapshot(root, int(sys.argv[2]) if len(sys.argv) > 2 else 10_000_000)
