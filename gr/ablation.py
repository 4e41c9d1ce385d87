"""Variants of a model against the first of them: quality by seed, and the encoder's arithmetic.

    python -m gr.ablation SWEEP_FOLDER FIRST --metrics ne-click ... [--window last] [--output JSON]
        [--plot PNG]

Reads the runs that a sweep left. Differences are between runs of the same seed. FLOPs of training
are those that the runs counted, of inference those of a forward pass over the same log with whole
sequences (no stochastic length), for each sequence in the mean.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from gr.atomic import write_atomically
from gr.config import TrainConfig
from gr.config_io import load_config
from gr.cost import flops_of_inference
from gr.report import markdown_table
from gr.runlog import CONFIG
from gr.runs import ALL, Run, mean_interval, read_run, window_named


def read_variants(folder: str | Path) -> dict[str, dict[int, Run]]:
    """Return variant -> seed -> run, of the finished runs of a sweep.

    Raises:
        ValueError: if there is none, or one of two configurations has the name and seed of another.
    """
    found: dict[str, dict[int, Run]] = {}
    for path in sorted(Path(folder).glob(f"*_s*_*/{CONFIG}")):
        run = read_run(path.parent)
        if ALL not in run.windows:
            continue
        label, seed, _ = path.parent.name.rsplit("_", 2)
        of_label = found.setdefault(label, {})
        if int(seed[1:]) in of_label:
            raise ValueError(
                f"{folder} holds two runs of {label}, seed {seed[1:]}: "
                f"{of_label[int(seed[1:])].path.name} and {path.parent.name}. Remove one"
            )
        of_label[int(seed[1:])] = run
    if not found:
        raise ValueError(f"{folder} holds no finished run of a sweep (LABEL_sSEED_ID)")
    return found


def ablation(
    folder: str | Path, first: str, metrics: Sequence[str], window: str = ALL
) -> list[dict[str, Any]]:
    """Return a record of each variant, the first one first.

    Args:
        folder: of the sweep.
        first: the variant that the others are compared with.
        metrics: columns of eval.jsonl.
        window: whose row is read: all, last (the latest of the pass), or a window by name.

    Raises:
        ValueError: if there is no such variant, or a run lacks the window or a metric.
    """
    variants = in_order(read_variants(folder), first)
    return [_record(name, runs, variants[0][1], metrics, window) for name, runs in variants]


def in_order(
    variants: Mapping[str, dict[int, Run]], first: str
) -> list[tuple[str, dict[int, Run]]]:
    """Return the variants with their runs, the first one first.

    Raises:
        ValueError: if there is no such variant.
    """
    if first not in variants:
        raise ValueError(f"no finished run is of {first!r}, but of {list(variants)}")
    return [(first, variants[first]), *((n, runs) for n, runs in variants.items() if n != first)]


def _record(
    name: str,
    runs: dict[int, Run],
    against: dict[int, Run],
    metrics: Sequence[str],
    window: str,
) -> dict[str, Any]:
    record: dict[str, Any] = {"variant": name, "window": window, "seeds": sorted(runs)}
    for metric in metrics:
        values = {seed: _value(run, metric, window) for seed, run in runs.items()}
        shared = sorted(set(values) & set(against))
        found = mean_interval(list(values.values()))
        differences = mean_interval(
            [values[s] - _value(against[s], metric, window) for s in shared]
        )
        assert found is not None
        record[metric] = {"mean": found[0], "half_width_95": _of_several(found)}
        if runs is not against and differences is not None:
            half_width = _of_several(differences)
            record[metric] |= {"difference": differences[0], "difference_95": half_width}
    last = [run.steps[-1] for run in runs.values()]
    record["train_flops"] = sum(x["flops"] for x in last) / sum(x["examples"] for x in last)
    record["inference_flops"] = mean_inference_flops(next(iter(runs.values())).path)
    return record


def _of_several(found: tuple[float, float, int]) -> float | None:
    """Return the half width of an interval; None for one value, which has none."""
    return found[1] if found[2] > 1 else None


def _value(run: Run, metric: str, window: str) -> float:
    name = window_named(run.windows, window)
    if name not in run.windows:
        raise ValueError(f"{run.path} has no window {name!r}, but {sorted(run.windows)}")
    value = run.windows[name].get(metric)
    if value is None:
        raise ValueError(f"{run.path} has no {metric!r}, but {sorted(run.windows[name])}")
    return float(value)


def mean_inference_flops(run_dir: str | Path) -> float:
    """Return the encoder's FLOPs of a forward pass, for a sequence in the mean over the run's log.

    Args:
        run_dir: its configuration is read, and the log that it names.
    """
    config, _ = load_config(TrainConfig, Path(run_dir) / CONFIG)
    flops, sequences = flops_of_inference(config)
    return flops / max(1, sequences)


def table(records: Sequence[dict[str, Any]], metrics: Sequence[str]) -> str:
    """Return the records in Markdown; compute as shares of the first's."""
    rows = []
    for record in records:
        cells = [record["variant"]]
        for metric in metrics:
            of = record[metric]
            is_first = "difference" not in of
            half_width = of["half_width_95" if is_first else "difference_95"]
            shown = f"{of['mean']:.4f}" if is_first else f"{of['difference']:+.4f}"
            cells.append(shown if half_width is None else f"{shown} +/- {half_width:.4f}")
        for kind in ("train_flops", "inference_flops"):
            share = record[kind] / records[0][kind]
            cells.append(f"{record[kind] / 1e6:.1f} ({share:.3f})")
        rows.append(cells)
    head = ["variant", *metrics, "training, MFLOP a sequence", "inference, MFLOP a sequence"]
    return markdown_table(head, rows)


def draw(records: Sequence[dict[str, Any]], metric: str, path: Path) -> None:
    """Draw the difference of a metric to the first variant against FLOPs, of training and not.

    Args:
        records: of `ablation`.
        metric: one of theirs.
        path: PNG file.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("train_flops", "inference_flops"), strict=True):
        axis.axhline(0.0, color="0.7", linewidth=0.8)
        for i, record in enumerate(records):
            of = record[metric]
            axis.errorbar(
                record[kind] / records[0][kind],
                of.get("difference", 0.0),
                yerr=of.get("difference_95") or 0.0,
                fmt="os^Dv<>Ph*"[i % 10],
                capsize=3,
                label=record["variant"],
            )
        name = kind.split("_")[0]
        axis.set_xlabel(
            f"FLOPs of {name.replace('train', 'training')}, share of {records[0]['variant']}"
        )
        axis.set_xlim(left=0)
    axes[0].set_ylabel(f"{metric}, difference (95 %)")
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write the records."""
    parser = argparse.ArgumentParser(prog="python -m gr.ablation")
    parser.add_argument("folder", help="of the sweep")
    parser.add_argument("first", help="variant that the others are compared with")
    parser.add_argument("--metrics", nargs="+", required=True, help="columns of eval.jsonl")
    parser.add_argument("--window", default=ALL, help="all, last, or a window by name")
    parser.add_argument("--output", type=Path, help="JSON file of the records")
    parser.add_argument("--plot", type=Path, help="PNG file, of the first metric")
    options = parser.parse_args(argv)
    records = ablation(options.folder, options.first, options.metrics, options.window)
    if options.output is not None:
        write_atomically(options.output, json.dumps(records, indent=1) + "\n")
    if options.plot is not None:
        draw(records, options.metrics[0], options.plot)
    print(table(records, options.metrics))  # noqa: T201 (its result)


if __name__ == "__main__":
    main()
