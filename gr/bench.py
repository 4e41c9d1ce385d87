"""`gr bench OP`: time an operator against its rivals and record the result.

Tests run first: of an operator whose tests fail, nothing is timed or recorded. Variants are
interleaved, each call timed by itself with the cache flushed before it; a copy of as many bytes is
one of them, so that shares of peak come from the same minutes on the same card.
"""

import argparse
import datetime
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from xml.etree import ElementTree

import torch

from kernels.bench import Case, Mode, OperatorBench

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "benchmarks" / "records.jsonl"
FLUSH_BYTES = 2 * 2**30
"""Written before each timed call: empties the cache, and takes a GPU about 0.5 ms, in which the
host gets ahead, so that launches and Python are not part of the time."""
COPY = "copy of as many bytes"


@dataclass(frozen=True)
class Record:
    """One line of records.jsonl: an operator at one case."""

    op: str
    impl: str
    mode: str
    case: str
    dtype: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    gb_per_s: float
    """Fewest bytes over the median time."""
    tflops: float
    share_of_copy: float
    """Median time of a copy of as many bytes, over ours."""
    share_of_matmul: float
    """Our TFLOP/s over those of a large matrix product of torch, same dtype, same process."""
    baseline_ms: dict[str, float]
    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str
    command: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gr bench`.

    Raises:
        ValueError: if there is no such operator, no GPU, or the operator's tests fail.
    """
    parser = argparse.ArgumentParser(prog="gr bench", description=__doc__)
    parser.add_argument("op", nargs="+", help=f"of {', '.join(operators())}; or all")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over the variants")
    parser.add_argument("--seconds", type=float, default=0.05, help="time of a variant in a round")
    parser.add_argument(
        "--records", type=pathlib.Path, default=RECORDS, help="JSON lines, appended"
    )
    parser.add_argument(
        "--no-record", action="store_true", help="skip the tests, write nothing; also on a CPU"
    )
    parser.add_argument(
        "--plot",
        type=pathlib.Path,
        help="draw the newest records of the first OP into this PNG file and do nothing else",
    )
    parser.add_argument("--commit", default="", help="recorded where there is no git checkout")
    arguments = parser.parse_args(argv)
    if arguments.plot is not None:
        load(arguments.op[0])
        # Draws with matplotlib, which a machine that only measures need not have.
        from gr.bench_plot import draw_records

        draw_records(arguments.records, arguments.op[0], arguments.plot)
        return 0
    names = operators() if arguments.op == ["all"] else arguments.op
    benches = {name: load(name) for name in names}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.no_record:
        raise ValueError("gr bench records on a GPU only and found none: use --no-record to try it")
    command = shlex.join(["gr", "bench", *(sys.argv[2:] if argv is None else argv)])
    red = [] if arguments.no_record else red_operators(names)
    for name, bench in benches.items():
        if name in red:
            continue
        for case in bench.CASES:
            if arguments.case not in case.name:
                continue
            for mode in case.modes:
                times = measure(
                    {**bench.variants(case, mode, device), **copy_of(bench, case, mode, device)},
                    device=device,
                    rounds=arguments.rounds,
                    seconds=arguments.seconds,
                )
                record = summarize(
                    name, bench, case, mode, times, device, commit(arguments.commit), command
                )
                print_record(record)
                if not arguments.no_record:
                    with arguments.records.open("a") as lines:
                        lines.write(json.dumps(asdict(record)) + "\n")
    if red:
        raise ValueError(
            f"tests of {', '.join(red)} fail (see above): nothing of theirs is recorded until they "
            "pass"
        )
    return 0


def operators() -> list[str]:
    """Return the operators that have a bench.py."""
    return sorted(path.parent.name for path in (ROOT / "kernels").glob("*/bench.py"))


def load(name: str) -> OperatorBench:
    """Return the module kernels.NAME.bench.

    Raises:
        ValueError: if there is none.
    """
    if name not in operators():
        raise ValueError(f"expected an operator of {', '.join(operators())}, or all; got {name!r}")
    module: OperatorBench = importlib.import_module(f"kernels.{name}.bench")  # type: ignore[assignment]
    return module


def red_operators(names: Sequence[str]) -> list[str]:
    """Run the tests of operators and return those of which one fails.

    In as many processes as there are processors, where pytest-xdist is installed.

    Raises:
        ValueError: if an operator has no tests.
    """
    files: dict[str, list[pathlib.Path]] = {}
    for name in names:
        files[name] = sorted((ROOT / "tests" / "kernels").glob(f"test_{name}*.py"))
        if not files[name]:
            raise ValueError(f"tests/kernels/test_{name}*.py: expected tests of {name}, found none")
    has_xdist = importlib.util.find_spec("xdist") is not None
    workers = ["-n", str(os.cpu_count()), "--dist", "loadgroup"] if has_xdist else []
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        options = ["-q", "--continue-on-collection-errors", *workers, f"--junit-xml={report}"]
        paths = [str(path) for found in files.values() for path in found]
        done = subprocess.run([sys.executable, "-m", "pytest", *options, *paths], cwd=ROOT)
        if done.returncode == 0:
            return []
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
        failed = [
            f"{case.get('classname')}.{case.get('name')}"
            for case in cases
            if case.find("failure") is not None or case.find("error") is not None
        ]
    stems = {name: [path.stem for path in found] for name, found in files.items()}
    red = [
        name
        for name, found in stems.items()
        if any(stem in case.split(".") for stem in found for case in failed)
    ]
    # Red for another reason (pytest itself): none of them is known to be right.
    return red or list(names)


def measure(
    variants: dict[str, Callable[[], object]], *, device: str, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Return the times of single calls in ms, by variant.

    Args:
        variants: what to call; "ours" first. Each is called once before it is timed.
        device: cuda (timed by events, cache flushed before each call) or cpu (wall clock).
        rounds: each round times every variant, starting with another one each time.
        seconds: time spent on one variant in one round; at least 5 calls.
    """
    timer = _time_cuda if device == "cuda" else _time_cpu
    calls = {
        name: max(5, int(1e3 * seconds / timer(call, 3)[-1])) for name, call in variants.items()
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name] += timer(variants[name], min(calls[name], 200))
    return times


def _time_cuda(call: Callable[[], object], times: int) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.Event("cuda", enable_timing=True) for _ in range(2)] for _ in range(times)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _time_cpu(call: Callable[[], object], times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def copy_of(
    bench: OperatorBench, case: Case, mode: Mode, device: str
) -> dict[str, Callable[[], object]]:
    """Return the variant that copies half as many bytes: it reads and writes as many in all."""
    source = torch.randn(bench.bytes_moved(case, mode) // 2 // 4, device=device)
    target = torch.empty_like(source)
    return {COPY: lambda: target.copy_(source)}


@functools.cache
def matmul_tflops(dtype: torch.dtype, device: str) -> float:
    """Return the TFLOP/s of a square matrix product of torch on random data."""
    size = 8192 if device == "cuda" else 256
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind(0)
    times = measure({"matmul": lambda: a @ b}, device=device, rounds=1, seconds=0.1)["matmul"]
    return 2 * size**3 / statistics.median(times) / 1e9


def summarize(
    name: str,
    bench: OperatorBench,
    case: Case,
    mode: Mode,
    times: dict[str, list[float]],
    device: str,
    commit: str,
    command: str,
) -> Record:
    """Return the record of one case from the times of its variants."""
    ours = sorted(times["ours"])
    p20, p50, p80 = (ours[int(q * (len(ours) - 1))] for q in (0.2, 0.5, 0.8))
    flops = bench.flops(case, mode)
    tflops = flops / p50 / 1e9
    medians = {key: statistics.median(found) for key, found in times.items()}
    return Record(
        op=name,
        impl="auto" if device == "cuda" else "reference",
        mode=mode,
        case=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        ms_p20=round(p20, 5),
        ms_p50=round(p50, 5),
        ms_p80=round(p80, 5),
        gb_per_s=round(bench.bytes_moved(case, mode) / p50 / 1e6, 1),
        tflops=round(tflops, 2),
        share_of_copy=round(medians[COPY] / p50, 4),
        share_of_matmul=round(tflops / matmul_tflops(case.dtype, device), 4) if flops else 0.0,
        baseline_ms={key: round(ms, 5) for key, ms in medians.items() if key != "ours"},
        gpu=torch.cuda.get_device_name() if device == "cuda" else "none",
        driver=driver() if device == "cuda" else "none",
        torch=torch.__version__,
        triton=importlib.import_module("triton").__version__,
        commit=commit,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        command=command,
    )


def print_record(record: Record) -> None:
    """Print one line of the table: our time, its share of both peaks, and every rival's time."""
    rivals = "  ".join(
        f"{key} {ms:.4f} ms ({ms / record.ms_p50:.2f}x)" for key, ms in record.baseline_ms.items()
    )
    share = f"({record.share_of_copy:.0%} of copy)"
    arithmetic = f"{record.tflops:7.1f} TFLOP/s ({record.share_of_matmul:.0%} of matmul)  "
    sys.stdout.write(
        f"{record.op:16s} {record.mode:8s} {record.case:24s} {record.dtype:8s} "
        f"{record.ms_p50:8.4f} ms  {record.gb_per_s:7.0f} GB/s {share}  "
        f"{arithmetic if record.tflops else ''}| {rivals}\n"
    )
    sys.stdout.flush()


def commit(given: str) -> str:
    """Return the commit of the checkout, with + if it has changes; `given` outside a checkout."""
    found = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() if found.returncode == 0 else given or "unknown"


def driver() -> str:
    """Return the version of the GPU driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
