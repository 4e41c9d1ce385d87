"""Draw the records of one operator: what it reaches beside its rivals, case by case."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COPY = "copy of as many bytes"


def draw_records(records: Path, op: str, path: Path) -> None:
    """Draw the speed of every variant relative to ours, a panel for each mode.

    The newest record of a case stands for it, if it was taken on the card of the operator's newest
    record; a case is drawn if a rival was timed with it.

    Args:
        records: JSON lines as `gr bench` appends them.
        op: name of the operator.
        path: PNG file to write.

    Raises:
        ValueError: if there is nothing to draw.
    """
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    rows = [row for row in rows if row["op"] == op and len(row["baseline_ms"]) > 1]
    if not rows:
        raise ValueError(
            f"{records}: expected records of {op} beside rivals, found none; make some with: "
            f"gr bench {op}"
        )
    card = rows[-1]["gpu"]
    newest = {(row["mode"], row["case"]): row for row in rows if row["gpu"] == card}
    modes = list(dict.fromkeys(mode for mode, _ in newest))
    figure, panels = plt.subplots(
        len(modes), 1, figsize=(12, 3.6 * len(modes)), layout="constrained", squeeze=False
    )
    for panel, mode in zip(panels[:, 0], modes, strict=True):
        _draw_mode(panel, [row for (m, _), row in newest.items() if m == mode])
        panel.set_title(f"{op}, {mode}", loc="left", fontsize=10)
    last = rows[-1]
    figure.suptitle(
        f"{card}, torch {last['torch']}, triton {last['triton']}, {last['date']}, "
        f"commit {last['commit']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_mode(panel: Any, rows: list[dict[str, Any]]) -> None:
    rivals = dict.fromkeys(n for row in rows for n in row["baseline_ms"] if n != COPY)
    bars: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ("ours", *rivals)}
    for x, row in enumerate(rows):
        times = {"ours": row["ms_p50"], **row["baseline_ms"]}
        present = [name for name in bars if name in times]
        width = 0.8 / len(present)
        for i, name in enumerate(present):
            left = x - 0.4 + (i + 0.5) * width
            bars[name].append((left, row["ms_p50"] / times[name], width))
        rate = f"{row['tflops']:.0f}" if row["tflops"] else f"{row['gb_per_s']:.0f}\nGB/s"
        panel.annotate(rate, (x - 0.4 + width / 2, 1.0), ha="center", va="bottom", fontsize=7)
    for name, found in bars.items():
        panel.bar(*zip(*found, strict=True), label=name)
    panel.set_xticks(range(len(rows)), [row["case"].replace(" ", "\n") for row in rows], fontsize=8)
    panel.axhline(1.0, color="0.7", linewidth=0.8, zorder=0)
    panel.set_ylabel("speed, ours = 1\n(number: TFLOP/s of ours)", fontsize=8)
    panel.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    panel.spines[["top", "right"]].set_visible(False)
