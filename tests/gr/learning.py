"""Loss curves of `gr train` on each implementation of the layer, for a test and for a figure.

    python -m tests.gr.learning FOLDER [key=value...]

Needs a GPU. FOLDER gets a synthetic log (configs/synthetic_urn_log.yaml), a run directory of each
run, curves.json and curves.png; a second call draws what is there. The reference computes in
float32, the kernels in bf16 or fp8. Of one seed all runs begin with the same weights and see the
same batches.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gr.config import TrainConfig
from gr.config_io import load_config
from gr.runlog import read_lines
from gr.train import train
from pipelines.synthetic.config import SyntheticConfig
from pipelines.synthetic.synthesize import synthesize

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
STEPS, WINDOW, SEEDS = 200, 20, (0, 1)
MODEL = (
    "model.dim=128",
    "model.hstu.qk_dim=64",
    "model.hstu.v_dim=64",
    "model.hstu.bias=position_time",
)
"""Of the figure: dims that the kernels for Hopper and fp8 take, and everything in the attention."""
FP8 = ("model.hstu.precision=fp8", "model.hstu.fp8_products=[uvqk,output]")
VARIANTS = {
    "reference, fp32": ("model.hstu.impl=reference", "precision=fp32"),
    "kernels, bf16": ("precision=bf16",),
    "kernels, fp8": ("precision=bf16", *FP8),
}
"""Overrides of a run; the implementation of the kernels' runs is the default."""


def write_log(output: Path, *overrides: str) -> Path:
    """Write the log of configs/synthetic_urn_log.yaml and return its folder."""
    path, overrides = CONFIGS / "synthetic_urn_log.yaml", (*overrides, f"output={output}")
    synthesize(load_config(SyntheticConfig, path, overrides)[0])
    return output


def learn(log: Path, run_dir: Path, *overrides: str) -> Tensor:
    """Train as `gr train` does and return the loss of each step, (steps,) float64 on the CPU."""
    overrides = (f"data.log={log}", f"run_dir={run_dir}", "log_every=1", *overrides)
    config, resolved = load_config(TrainConfig, CONFIGS / "synthetic_urn.yaml", overrides)
    train(config, resolved, overrides)
    rows = read_lines(run_dir / "metrics.jsonl")
    return torch.tensor([row["train/loss"] for row in rows], dtype=torch.float64)


def learn_all(folder: Path, *overrides: str) -> dict[str, list[Tensor]]:
    """Return the losses of each variant, by seed."""
    log = write_log(folder / "log", "polya_urn.num_users=1000")
    return {
        name: [
            learn(
                *(log, folder / f"{name.replace(', ', '_')}_{seed}"),
                *(*MODEL, f"max_steps={STEPS}", *overrides, *variant, f"seed={seed}"),
            )
            for seed in SEEDS
        ]
        for name, variant in VARIANTS.items()
    }


def smooth(losses: Tensor) -> Tensor:
    """Return the mean of every WINDOW steps."""
    return losses.unfold(0, WINDOW, WINDOW).mean(1)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two smoothed curves."""
    return (smooth(a) - smooth(b)).abs().max().item()


def draw(curves: dict[str, list[Tensor]], path: Path) -> None:
    """Draw smoothed curves, a colour for each variant and a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    # The reference lies under the others: its line is broad.
    for i, (name, by_seed) in enumerate(curves.items()):
        for seed, losses in enumerate(by_seed):
            mean = smooth(losses)
            style = {"color": f"C{i}", "linestyle": ["-", "--", ":"][seed], "marker": "o", "ms": 3}
            style |= {"linewidth": 5, "alpha": 0.35} if i == 0 else {"linewidth": 1.2}
            steps = WINDOW * torch.arange(1, len(mean) + 1)
            axes.plot(steps, mean, label=f"{name}, seed {seed}", **style)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(folder: str, *overrides: str) -> None:
    """Learn, unless the curves are there, print distances and draw."""
    file = Path(folder) / "curves.json"
    if not file.exists():
        found = learn_all(Path(folder), *overrides)
        lists = {name: [x.tolist() for x in by_seed] for name, by_seed in found.items()}
        file.write_text(json.dumps(lists))
    curves = {
        name: [torch.tensor(x) for x in by_seed]
        for name, by_seed in json.loads(file.read_text()).items()
    }
    print(describe(curves))
    draw(curves, file.with_suffix(".png"))


def describe(curves: dict[str, list[Tensor]]) -> str:
    """Return a table: the end of each curve, and its distance from the reference's of its seed."""
    reference = next(iter(curves.values()))
    lines = [f"references of two seeds: {distance(*reference[:2]):.4f} apart at most"]
    for name, by_seed in curves.items():
        for seed, losses in enumerate(by_seed):
            end, off = losses[-WINDOW:].mean().item(), distance(losses, reference[seed])
            lines.append(f"{name}, seed {seed}: last {WINDOW} steps {end:.4f}, off {off:.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    if not arguments:
        raise SystemExit(__doc__)
    main(*arguments)
