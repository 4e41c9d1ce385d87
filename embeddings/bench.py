"""What the tables cost on a GPU: memory, time of the sparse section, deduplication, caching.

    python -m embeddings.bench [memory momentum dedup cache ...] [--rows N] [--dim D] [--ids L]

On several GPUs under torchrun. The sparse section is lookup, backward and update for given
gradients: all of a training step that the dense part has no share in. Times are medians over steps;
below some 200,000 ids they are those of TorchRec's Python, 4 ms, which a real step hides.
"""

import argparse
import gc
import os
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.collection import build_tables
from embeddings.config import EmbeddingsConfig, TableConfig
from embeddings.memory import GIB
from embeddings.sharded import ShardedTables
from embeddings.tables import PendingLookup

SEQUENCES = 128
WARM_UP, STEPS = 5, 30
LAYERS = 40_000_000
"""Cycles of the GPU between two sparse sections, about 20 ms."""
ZIPF = 1.05
"""Exponent of the ids of `cache`: item popularity of a large log."""


def main() -> None:
    """Run the measurements that are named, all of them by default."""
    parser = argparse.ArgumentParser(prog="python -m embeddings.bench")
    parser.add_argument("what", nargs="*", help=f"of {', '.join(MEASUREMENTS)}; all by default")
    parser.add_argument("--rows", type=int, default=20_000_000, help="of the table")
    parser.add_argument("--dim", type=int, default=128, help="of a row")
    parser.add_argument("--ids", type=int, default=524_288, help="looked up in a step on a rank")
    options = parser.parse_args()
    unknown = [name for name in options.what if name not in MEASUREMENTS]
    if unknown:
        parser.error(f"expected measurements of {list(MEASUREMENTS)}, got {unknown}")
    if not torch.cuda.is_available():
        raise SystemExit("embeddings.bench measures on a GPU: torch sees none here")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29513")
    dist.init_process_group("nccl", device_id=device)
    gpu, ranks = torch.cuda.get_device_name(device), dist.get_world_size()
    _say(f"{gpu} x {ranks}, torch {torch.__version__}: {options.rows:,} x {options.dim}, ")
    _say(f"{options.ids:,} ids a step and rank, medians of {STEPS} steps")
    for name in options.what or MEASUREMENTS:
        MEASUREMENTS[name](options, device)
    dist.destroy_process_group()


def measure_memory(options: argparse.Namespace, device: torch.device) -> None:
    """HBM bytes of a parameter, as the driver counts them."""
    parameters = options.rows * options.dim / dist.get_world_size()
    for weights, momentum in (("fp32", "hbm"), ("fp16", "hbm"), ("fp16", "host")):
        before = _used_bytes(device)
        tables = _build(options, device, weights=weights, momentum=momentum)
        used = (_used_bytes(device) - before) / parameters
        _say(
            f"memory    {weights} weights, momentum in {momentum:4}  {used:6.3f} HBM bytes a param."
        )
        del tables


def measure_momentum(options: argparse.Namespace, device: torch.device) -> None:
    """The first moment in host memory against HBM."""
    _compare("momentum", "momentum", "host", "hbm", options, device)


def measure_dedup(options: argparse.Namespace, device: torch.device) -> None:
    """Each id sent once against as often as it occurs."""
    _compare("dedup", "index_dedup", "off", "on", options, device)


def _compare(
    what: str,
    setting: str,
    slow: str,
    fast: str,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Time fp16 tables with both values of a setting, with many repeated ids and with none.

    Ids travel a step ahead, as in training.
    """
    for repeats in (0.95, 0.0):
        times = {}
        for value in (fast, slow):
            changes: dict[str, Any] = {"weights": "fp16", setting: value}
            tables = _build(options, device, **changes)
            ids = _repeated_ids(options, device, repeats)
            times[value] = _time(tables, ids, options, ahead=True)
            del tables
        _report(f"{what:9} fp16, {repeats:.0%} repeats", times, slow, fast)


def measure_cache(options: argparse.Namespace, device: torch.device) -> None:
    """A table four times the HBM that it has against one that is all in HBM."""
    times, losses = {}, {}
    hits = (0, 0)
    quarter = options.rows * options.dim * 4 / 4 / GIB
    for name, hbm_gb, ahead in (
        ("HBM", 0.0, False),
        ("cached", quarter, False),
        ("cached, prefetched", quarter, True),
    ):
        tables = _build(options, device, hbm_gb=hbm_gb)
        ids = _zipf_ids(options, device)
        warm = [_step(tables, next(ids)) for _ in range(50)]
        tables.take_cache_hits()
        times[name] = _time(tables, ids, options, ahead=ahead)
        hits = tables.take_cache_hits()
        rest = [_step(tables, next(ids)) for _ in range(10)]
        losses[name] = torch.stack([*warm, *rest]).double()
        found = f"; {hits[0] / hits[1]:.1%} of the distinct rows found" if hits[1] else ""
        _say(f"cache     fp32, {name:20} {times[name]:7.3f} ms{found}")
        del tables
    for name in ("cached", "cached, prefetched"):
        off = ((losses[name] - losses["HBM"]) / losses["HBM"]).abs().max()
        _say(f"cache     {name:20} {times[name] / times['HBM']:.2f}x; losses differ by {off:.1e}")


MEASUREMENTS = {
    "memory": measure_memory,
    "momentum": measure_momentum,
    "dedup": measure_dedup,
    "cache": measure_cache,
}


def _build(
    options: argparse.Namespace, device: torch.device, *, hbm_gb: float = 0.0, **changes: Any
) -> ShardedTables:
    gc.collect()
    torch.cuda.empty_cache()
    table = TableConfig(
        num_embeddings=options.rows,
        dim=options.dim,
        features=("item_id",),
        init_std=0.0,
        hbm_gb=hbm_gb,
    )
    config = EmbeddingsConfig(tables={"item": table}, form="sharded", sharding=("row_wise",))
    tables = build_tables(
        replace(config, **changes),
        device=device,
        seed=0,
        num_sequences_hint=SEQUENCES,
        mean_length_hint=options.ids / SEQUENCES,
    )
    assert isinstance(tables, ShardedTables)
    return tables


def _used_bytes(device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _repeated_ids(
    options: argparse.Namespace, device: torch.device, repeats: float
) -> Iterator[Tensor]:
    """Yield ids of which the share `repeats` occurred earlier in the batch."""
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    draw = {"generator": generator, "device": device}
    distinct = max(1, round(options.ids * (1 - repeats)))
    while True:
        some = torch.randint(0, options.rows, (distinct,), **draw)  # type: ignore[call-overload]
        if distinct == options.ids:
            yield some
            continue
        again = torch.randint(0, distinct, (options.ids - distinct,), **draw)  # type: ignore[call-overload]
        order = torch.randperm(options.ids, **draw)  # type: ignore[call-overload]
        yield torch.cat([some, some[again]])[order]


def _zipf_ids(options: argparse.Namespace, device: torch.device) -> Iterator[Tensor]:
    """Yield ids whose popularity falls as a power of their rank; ranks are spread over the rows."""
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    popularity = torch.arange(1, options.rows + 1, device=device, dtype=torch.float64) ** -ZIPF
    bounds = popularity.cumsum(0)
    spread = torch.randperm(options.rows, generator=generator, device=device)
    while True:
        at = torch.rand(options.ids, generator=generator, device=device, dtype=torch.float64)
        rank = torch.searchsorted(bounds, at * bounds[-1]).clamp_max_(options.rows - 1)
        yield spread[rank]


def _rows(ids: Tensor) -> KeyedJaggedTensor:
    lengths = torch.full((SEQUENCES,), ids.numel() // SEQUENCES, device=ids.device)
    lengths[-1] += ids.numel() % SEQUENCES
    return KeyedJaggedTensor(
        keys=["item_id"], values=ids, lengths=lengths, offset_per_key=[0, ids.numel()]
    )


def _step(tables: ShardedTables, ids: Tensor) -> Tensor:
    """Pull the rows towards vectors that their ids name; return the loss."""
    found = tables.lookup(_rows(ids))["item_id"]
    target = torch.sin(ids[:, None] * torch.arange(1, found.shape[1] + 1, device=ids.device))
    loss = (found - target).square().sum() / ids.numel()
    loss.backward()  # type: ignore[no-untyped-call]
    tables.optimizer_step()
    return loss.detach()


def _time(
    tables: ShardedTables,
    ids: Iterator[Tensor],
    options: argparse.Namespace,
    *,
    ahead: bool = False,
) -> float:
    """Return the median milliseconds of a sparse section.

    Of the device: the host is ahead of it, as while the layers of a step are computed.
    """
    generator = torch.Generator(tables.device).manual_seed(1)
    gradient = torch.randn(options.ids, options.dim, generator=generator, device=tables.device)
    events = []
    batches = [next(ids) for _ in range(WARM_UP + STEPS)]
    sent: PendingLookup | None = _send(tables, batches[0]) if ahead else None
    for current, following in zip(batches, [*batches[1:], None], strict=True):
        start, end = (
            torch.Event("cuda", enable_timing=True),
            torch.Event("cuda", enable_timing=True),
        )
        torch.cuda._sleep(LAYERS)  # type: ignore[no-untyped-call]
        start.record()
        after = _send(tables, following) if ahead and following is not None else None
        found = tables.lookup(sent or _rows(current))["item_id"]
        if after is not None:
            after.advance()
        found.backward(gradient)  # type: ignore[no-untyped-call]
        tables.optimizer_step()
        end.record()
        events.append((start, end))
        sent = after
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in events[WARM_UP:]]
    return statistics.median(times)


def _send(tables: ShardedTables, ids: Tensor) -> PendingLookup:
    """Send as gr.staging does: from the stream that brings batches, which waits for nothing."""
    with torch.cuda.stream(tables.exchange):
        return tables.send(_rows(ids))


def _report(what: str, times: dict[str, float], slow: str, fast: str) -> None:
    parts = "  ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    _say(f"{what}: {parts}  ratio {slow}/{fast} {times[slow] / times[fast]:.2f}x")


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
