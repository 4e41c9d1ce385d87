"""The command of a bench of GPU measurements: which to make, where the records go, what failed."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
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
    failed = []
    for name in names:
        free()
        try:
            found[name] = measurements[name](shape)
        except Exception:
            # Whatever it is (memory, a kernel), what comes next can be measured. It is printed, and
            # the exit status tells.
            traceback.print_exc()
            failed.append(name)
            continue
        shown = json.dumps({key: float(f"{value:.4g}") for key, value in found[name].items()})
        print(f"{name}: {shown}", flush=True)
        if options.records is not None:
            with options.records.open("a") as lines:
                lines.write(json.dumps(record(name, found[name])) + "\n")
    for line in summary(found):
        print(line, flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def record(name: str, figures: Figures) -> dict[str, object]:
    """Return a line of the records: what was measured, on what, of which commit."""
    has_gpu = torch.cuda.is_available()
    return {
        "what": name,
        "figures": {key: float(f"{value:.6g}") for key, value in figures.items()},
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "torch": torch.__version__,
        "commit": os.environ.get("GR_COMMIT", ""),
    }
