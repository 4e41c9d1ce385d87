"""The command of a bench of GPU measurements: which to make, where the records go, what failed."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from gr.bench_encoders import Figures, Shape, free


def measure(
    module: str,
    measurements: Mapping[str, Callable[[Shape], Figures]],
    shape: Shape,
    summary: Callable[[Mapping[str, Figures]], Sequence[str]] = lambda found: (),
) -> None:
    """Measure what the command line names, all of it by default, and print each as it is found.

    Args:
        module: that `python -m` runs.
        measurements: by name.
        shape: what they are given.
        summary: lines to print at the end, of what was found.

    Raises:
        SystemExit: for a name that there is not, without a GPU, and at the end if any failed.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("what", nargs="*", help=f"of {', '.join(measurements)}; all by default")
    parser.add_argument("--records", type=Path, help="JSON lines, appended")
    options = parser.parse_args()
    names = options.what or list(measurements)
    unknown = [name for name in names if name not in measurements]
    if unknown:
        parser.error(f"expected measurements of {list(measurements)}, got {unknown}")
    if not torch.cuda.is_available():
        parser.error("these are measurements of a GPU, and there is none")
    found: dict[str, Figures] = {}
    failed: list[str] = []
    for name in names:
        free()
        with attempt(name, failed):
            found[name] = measurements[name](shape)
        if name in found:
            report(name, found[name], options.records)
    for line in summary(found):
        print(line, flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


@contextmanager
def attempt(name: str, failed: list[str]) -> Iterator[None]:
    """Let a measurement fail without those that follow: it is printed, and added to `failed`."""
    try:
        yield
    except Exception:
        # Whatever it is (memory, a kernel), what comes next can be measured. Who calls ends with
        # an exit status that tells.
        traceback.print_exc()
        failed.append(name)


def report(name: str, figures: Figures, records: Path | None) -> None:
    """Print what was measured, and append a line: of what, on what, of which commit."""
    shown = json.dumps({key: float(f"{value:.4g}") for key, value in figures.items()})
    print(f"{name}: {shown}", flush=True)
    if records is None:
        return
    has_gpu = torch.cuda.is_available()
    line = {
        "what": name,
        "figures": {key: float(f"{value:.6g}") for key, value in figures.items()},
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "torch": torch.__version__,
        "commit": os.environ.get("GR_COMMIT", ""),
    }
    with records.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")
