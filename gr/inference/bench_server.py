"""`python -m gr.inference.bench_server RUN`: `gr serve` under load from another process.

Each row: so many clients, each of which asks for the next answer when it has the last, over a
connection that stays open. Users are drawn from those of the log, by a seed. Prints a table in
Markdown; the last rows overload a server with a short queue on purpose.
"""

import argparse
import asyncio
import collections
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq

from gr.evaluate import run_config
from gr.runlog import describe_commit
from pipelines.manifest import read_manifest

SEED = 0
COLUMNS = ("request", "clients", "requests/s", "p50, ms", "p99, ms", "statuses", "RSS, MB", "then")


@dataclass
class Load:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    """Of each answer 200."""
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", metavar="RUN", help="run directory")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a row")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--retrieve", type=int, default=100)
    arguments = parser.parse_args()
    users, items, end = users_and_items(arguments.run_dir)
    clients = [int(text) for text in arguments.clients.split(",")]
    requests = {
        f"score {arguments.candidates}": {"candidates": arguments.candidates},
        f"retrieve {arguments.retrieve}, rank, top 10": {"retrieve": arguments.retrieve},
    }
    cores = len(os.sched_getaffinity(0))
    commit = describe_commit(Path(__file__).resolve().parents[2]).splitlines()[0]
    print(f"{cores} cores, {platform.machine()}, {commit}")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with served(arguments.run_dir) as (process, address):
        drive(address, bodies(users, items, end, candidates=1), 1, 2.0)
        for name, what in requests.items():
            for number in clients:
                report(process, address, name, bodies(users, items, end, **what), number, arguments)
    with served(arguments.run_dir, "--max-queue", "16", "--max-batch", "8") as (process, address):
        drive(address, bodies(users, items, end, candidates=1), 1, 2.0)
        for number in (64, 256):
            name = f"queue of 16: score {arguments.candidates}"
            body = bodies(users, items, end, candidates=arguments.candidates)
            report(process, address, name, body, number, arguments)


def users_and_items(run_dir: str) -> tuple[list[int], list[int], int]:
    """Return the users of a run's log, items that they met, and a time after the log."""
    manifest = read_manifest(run_config(run_dir).data.log)
    users: set[int] = set()
    items: set[int] = set()
    for part in manifest.parts:
        table = pq.read_table(manifest.folder / part.name, columns=["user_id", "events"])
        users.update(table["user_id"].to_pylist())
        events = table["events"].combine_chunks().flatten()
        items.update(events.field("item_id").unique().to_pylist())
    return sorted(users), sorted(items), manifest.end_ts + 3600


def bodies(
    users: list[int], items: list[int], end: int, *, candidates: int = 0, retrieve: int = 0
) -> Iterator[bytes]:
    """Yield requests without end."""
    random = np.random.default_rng(SEED)
    while True:
        body: dict[str, object] = {"user_id": int(random.choice(users)), "time": end}
        if candidates:
            body["candidates"] = random.choice(items, candidates, replace=False).tolist()
        else:
            body |= {"retrieve": retrieve, "exclude_seen": True, "top": 10}
        yield json.dumps(body).encode()


def report(
    process: psutil.Process,
    address: tuple[str, int],
    name: str,
    body: Iterator[bytes],
    clients: int,
    arguments: argparse.Namespace,
) -> None:
    """Drive one row and print it."""
    before = process.memory_info().rss
    load = drive(address, body, clients, arguments.seconds)
    after = process.memory_info().rss
    p50, p99 = np.percentile(load.seconds, [50, 99]) * 1000 if load.seconds else (np.nan, np.nan)
    statuses = ", ".join(f"{n} x {status}" for status, n in sorted(load.statuses.items()))
    print(
        f"| {name} | {clients} | {len(load.seconds) / arguments.seconds:,.0f} | {p50:.1f} | "
        f"{p99:.1f} | {statuses} | {before / 1e6:,.0f} | {after / 1e6:,.0f} |",
        flush=True,
    )


def drive(address: tuple[str, int], body: Iterator[bytes], clients: int, seconds: float) -> Load:
    """Return what so many clients see in so many seconds."""
    # Made before the clock starts: the cores are shared with the server.
    ready = collections.deque(next(body) for _ in range(min(4096, 64 * clients)))
    load = Load()

    async def client(until: float) -> None:
        reader, writer = await asyncio.open_connection(*address)
        while (start := time.perf_counter()) < until:
            ready.rotate(-1)
            writer.write(
                b"POST /recommend HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(ready[0]), ready[0])
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None
            await reader.readexactly(int(length[1]))
            status = int(head.split(b" ", 2)[1])
            load.statuses[status] += 1
            if status == 200:
                load.seconds.append(time.perf_counter() - start)
            else:
                await asyncio.sleep(0.01)  # who is refused does not come back at once
        writer.close()

    async def all_clients() -> None:
        until = time.perf_counter() + seconds
        await asyncio.gather(*(client(until) for _ in range(clients)))

    asyncio.run(all_clients())
    return load


@contextmanager
def served(run_dir: str, *options: str) -> Iterator[tuple[psutil.Process, tuple[str, int]]]:
    """Start `gr serve` and yield its process and address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gr", "serve", run_dir, "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            found = re.search(r"http://([\d.]+):(\d+)", line)
            if found:
                yield psutil.Process(process.pid), (found[1], int(found[2]))
                return
            sys.stderr.write(line)
        raise SystemExit("gr serve ended before it served")
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
