"""What it costs to find the rows of ids that come and go, against ids that number their rows.

    python -m embeddings.bench_ids [--rows N] [--ids L] [--device cuda|cpu]

Medians over steps of wall time, host included, with nothing else at work. A training step hides
what the host waits for; what the device does it does not.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import DynamicIdsConfig, EmbeddingsConfig, TableConfig
from embeddings.dynamic import DynamicVocabulary
from embeddings.vocabulary import Vocabulary

WARM_UP, STEPS = 3, 20
FILL = 2_000_000
"""New ids of a step while the map is filled."""


def main() -> None:
    """Print the milliseconds of each part."""
    parser = argparse.ArgumentParser(prog="python -m embeddings.bench_ids")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the table")
    parser.add_argument("--ids", type=int, default=131_072, help="looked up in a step")
    parser.add_argument("--full", action="store_true", help="only the table that is full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}: {options.rows:,} rows, {options.ids:,} ids a step, "
        f"medians of {STEPS} steps"
    )
    if options.full:
        measure_dynamic(options, device, new_share=0.01, share=1.0)
        return
    measure_static(options, device)
    for new_share, share in ((0.0, 0.5), (0.01, 0.5), (0.01, 1.0)):
        measure_dynamic(options, device, new_share=new_share, share=share)
    measure_dynamic(options, device, new_share=0.01, share=0.5, admit_after=2)


def measure_static(options: argparse.Namespace, device: torch.device) -> None:
    """Rows of ids that number them, found on the CPU and copied."""
    vocabulary = Vocabulary(_config(options, "static", 1))
    ids = [torch.randint(0, options.rows - 1, (options.ids,)) for _ in range(WARM_UP + STEPS)]

    def step(i: int) -> None:
        rows = vocabulary.rows(_jagged(ids[i]))
        if device.type == "cuda":
            rows.pin_memory().to(device, non_blocking=True)

    _report("static", _median(step, device))


def measure_dynamic(
    options: argparse.Namespace,
    device: torch.device,
    *,
    new_share: float,
    share: float,
    admit_after: int = 1,
) -> None:
    """Rows of ids that come and go, the table `share` full, part of the ids new."""
    config = _config(options, "dynamic", admit_after)
    vocabulary = DynamicVocabulary(config, device=device, seed=0)
    id_map = vocabulary.maps["item"]
    num_new = int(options.ids * new_share)
    # A full table has its first eviction in a step that counts.
    used = min(int((options.rows - 1) * share), options.rows - 1 - (WARM_UP + 2) * num_new)
    for first in range(0, used, FILL):
        ids = _scattered(torch.arange(first, min(first + FILL, used), device=device)).sort().values
        count = torch.full_like(ids, admit_after)
        id_map.observe(ids[:0], ids, count, step=0, time=0, sync=lambda _: None)
    batches = []
    for i in range(WARM_UP + STEPS):
        old = torch.randint(0, used, (options.ids - num_new,), device=device)
        new = used + i * num_new + torch.arange(num_new, device=device)
        batches.append(_jagged(_scattered(torch.cat([old, new]))))
    is_event = {"item_id": torch.ones(options.ids, dtype=torch.bool, device=device)}
    seen = [vocabulary.map(batches[0], is_event)[1]]

    def find(i: int) -> None:
        seen[0] = vocabulary.map(batches[i], is_event)[1]

    def observe(i: int) -> None:
        vocabulary.observe(seen[0], step=i + 1, time=0)

    # In turn: what a step finds depends on what the one before it changed.
    pairs = [(_ms(find, i, device), _ms(observe, i, device)) for i in range(WARM_UP + STEPS)]
    found, noted = zip(*pairs, strict=True)
    what = f"dynamic, {share:.0%} full, {new_share:.0%} new, admit_after {admit_after}"
    found_ms, noted_ms = (statistics.median(x[WARM_UP:]) for x in (found, noted))
    counts = f"{id_map.admitted - used:,} admitted, {id_map.evicted:,} evicted"
    slowest = max(noted[WARM_UP:])
    _report(what, found_ms, f"; observe {noted_ms:.3f} ms, at most {slowest:.3f}; {counts}")


def _config(options: argparse.Namespace, ids: str, admit_after: int) -> EmbeddingsConfig:
    table = TableConfig(
        num_embeddings=options.rows,
        dim=4,
        ids="dynamic" if ids == "dynamic" else "static",
        features=("item_id",),
        dynamic=DynamicIdsConfig(admit_after=admit_after),
    )
    return EmbeddingsConfig(tables={"item": table})


def _scattered(numbers: Tensor) -> Tensor:
    """Return distinct ids all over 64 bits for distinct numbers."""
    return numbers * -7046029254386353131  # odd, so that it is a permutation modulo 2^64


def _jagged(ids: Tensor) -> KeyedJaggedTensor:
    lengths = torch.tensor([ids.numel()], device=ids.device)
    return KeyedJaggedTensor(
        keys=["item_id"], values=ids, lengths=lengths, offset_per_key=[0, ids.numel()]
    )


def _median(step: Callable[[int], None], device: torch.device) -> float:
    times = [_ms(step, i, device) for i in range(WARM_UP + STEPS)]
    return statistics.median(times[WARM_UP:])


def _ms(action: Callable[[int], None], i: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action(i)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _report(what: str, ms: float, more: str = "") -> None:
    print(f"{what}: rows {ms:.3f} ms{more}", flush=True)


if __name__ == "__main__":
    main()
