"""Loss curves of one small model on the layer's implementations, for a test and for a figure.

    python -m tests.gr.learning curves.json curves.png     # on a GPU; the figure is of the file

A table of items, two HSTU layers with position and time bias, and scores of the next item, which
follows from the last one four times in five. The data depend on the seed alone.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from gr.config import HSTUConfig, ModelConfig
from gr.hstu import HSTUEncoder
from tests.gr.hstu_oracle import make_info, make_sequences, on_device

STEPS, WINDOW, NUM_ITEMS = 200, 20, 50
RUNS = {
    "reference, seed 0": ("reference", "bf16", 0),
    "reference, seed 1": ("reference", "bf16", 1),
    "kernels, bf16, seed 0": ("auto", "bf16", 0),
    "kernels, fp8, seed 0": ("auto", "fp8", 0),
}


class NextItem(nn.Module):
    """The encoder between a table of items and scores of the next."""

    def __init__(self, dim=64, **hstu):
        super().__init__()
        config = HSTUConfig(
            qk_dim=32, v_dim=32, scaling_length=64, bias="position_time", final_norm=True, **hstu
        )
        self.items = nn.Embedding(NUM_ITEMS, dim)
        self.encoder = HSTUEncoder(ModelConfig(dim=dim, num_layers=2, hstu=config))
        self.scores = nn.Linear(dim, NUM_ITEMS)

    def forward(self, item_L, info):
        return self.scores(self.encoder(self.items(item_L), info))


def draw_batch(generator, num_sequences):
    """Return (item_L, info) on the CPU."""
    lengths = torch.randint(20, 60, (num_sequences,), generator=generator).tolist()
    items = torch.randint(0, NUM_ITEMS, (sum(lengths),), generator=generator).tolist()
    follows = (torch.rand(sum(lengths), generator=generator) < 0.8).tolist()
    for i in range(1, sum(lengths)):
        if follows[i]:
            items[i] = (7 * items[i - 1] + 3) % NUM_ITEMS
    return torch.tensor(items), make_info(make_sequences(lengths, lengths, seed=0))


def learn(impl, precision, seed, *, device="cuda", steps=STEPS, num_sequences=32, autocast=True):
    """Return the loss of each step, (steps,) float32 on the CPU."""
    torch.manual_seed(seed)
    # Products in fp8 are UVQK's and the output projection's: all that can be.
    products = ("uvqk", "output") if precision == "fp8" else ()
    model = NextItem(impl=impl, precision=precision, fp8_products=products).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        item_L, info = draw_batch(data, num_sequences)
        item_L, info = item_L.to(device), on_device(info, device)
        with torch.autocast(device, torch.bfloat16, autocast):
            scores = model(item_L, info)
        loss = functional.cross_entropy(scores[:-1].float(), item_L[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def smooth(losses):
    """Return the mean of every WINDOW steps."""
    return losses.unfold(0, WINDOW, WINDOW).mean(1)


def distance(a, b):
    """Return the largest difference of two smoothed curves."""
    return (smooth(a) - smooth(b)).abs().max().item()


def draw(curves, path):
    """Draw smoothed curves by name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, losses in curves.items():
        mean = smooth(torch.tensor(losses))
        steps = WINDOW * torch.arange(1, len(mean) + 1)
        axes.plot(steps, mean, "--" if "reference" in name else "-", marker="o", ms=3, label=name)
    axes.set(xlabel="step", ylabel=f"cross entropy, mean of {WINDOW} steps")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(curves_path, figure_path):
    """Learn, unless the curves are there, print distances and draw."""
    file = Path(curves_path)
    if not file.exists():
        curves = {name: learn(*run).tolist() for name, run in RUNS.items()}
        file.write_text(json.dumps(curves))
    curves = {name: torch.tensor(losses) for name, losses in json.loads(file.read_text()).items()}
    base = curves["reference, seed 0"]
    for name, losses in curves.items():
        end = losses[-WINDOW:].mean().item()
        print(f"{name}: last {WINDOW} steps {end:.4f}, off {distance(losses, base):.4f} at most")
    draw(curves, figure_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
