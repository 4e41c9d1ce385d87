"""What a trace of steps says: when a GPU computes, communicates, waits."""

from typing import Any

Interval = tuple[float, float]


def device_intervals(events: list[dict[str, Any]]) -> tuple[list[Interval], list[Interval]]:
    """Return when a GPU communicated and when it did anything else, of a trace in Chrome's format.

    Communication is NCCL's kernels; everything else is kernels, copies and fills.
    """
    communication: list[Interval] = []
    others: list[Interval] = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            interval = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
            (communication if "nccl" in event["name"].lower() else others).append(interval)
    return communication, others


def waits(communication: list[Interval], others: list[Interval]) -> dict[str, float]:
    """Return the shares of the time from the first to the last interval.

    Returns:
        exposed: communication and nothing else; idle: nothing.
    """
    every = [*communication, *others]
    span = max(end for _, end in every) - min(start for start, _ in every)
    busy, computing = covered(every), covered(others)
    return {"exposed": (busy - computing) / span, "idle": 1 - busy / span}


def transfer(ranks: list[list[Interval]], others: list[Interval]) -> float:
    """Return the share of the time that is communication proper, and no waiting for other ranks.

    A rank that comes last to a collective waits for nobody: the least time of each is its own. NaN
    if the ranks communicated differently often.

    Args:
        ranks: when each rank communicated, the same collectives in the same order.
        others: when this rank did anything else.
    """
    every = [*ranks[0], *others]
    span = max(end for _, end in every) - min(start for start, _ in every)
    if len({len(intervals) for intervals in ranks}) != 1:
        return float("nan")
    each = zip(*(sorted(intervals) for intervals in ranks), strict=True)
    least: float = sum(min(end - start for start, end in same) for same in each)
    return least / span


def covered(intervals: list[Interval]) -> float:
    """Return the length of the union of intervals."""
    if not intervals:
        return 0.0
    ordered = sorted(intervals)
    total, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
