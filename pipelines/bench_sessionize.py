"""Events a second of sessionize with its write: python -m pipelines.bench_sessionize FOLDER.

The log is the Polya-urn stream: 28,000 users, 14 days, sessions of 20 events on average, one action
and one feature; by user, not by time. It is made once, in FOLDER.
"""

import resource
import sys
import time
from pathlib import Path

from pipelines.config import SessionizeConfig
from pipelines.sessionize import sessionize
from pipelines.synthetic.config import PolyaUrnConfig, SyntheticConfig
from pipelines.synthetic.synthesize import synthesize

THREADS = 2


def make_events(folder: Path, num_users: int = 28_000) -> None:
    """Write the event log of the benchmark."""
    urn = PolyaUrnConfig(
        num_users=num_users,
        num_items=1_280_000,
        num_timestamps=14,
        mean_events=20,
        min_events=1,
    )
    synthesize(
        SyntheticConfig(
            stream="polya_urn", output=str(folder), format="events", partitions=16, polya_urn=urn
        )
    )


def measure(events: Path, output: Path) -> dict[str, float]:
    """Return events, seconds and CPU seconds of one run of sessionize."""
    config = SessionizeConfig(
        input=str(events / "events"),
        output=str(output),
        overwrite=True,
        actions=("rating",),
        features=("category",),
        memory_gb=4.0,
        threads=THREADS,
    )
    start, start_cpu = time.perf_counter(), _cpu_seconds()
    num_events = sessionize(config).num_events
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - start_cpu
    return {
        "events": num_events,
        "seconds": seconds,
        "events_per_s": num_events / seconds,
        "cpu_us_per_event": cpu / num_events * 1e6,
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "events").exists():
        make_events(folder / "events")
    for _ in range(3):
        print(measure(folder / "events", folder / "log"))
