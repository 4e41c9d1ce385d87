"""`gr cost CONFIG`: what a run will cost, counted from its log without a model or a device."""

from dataclasses import dataclass, replace
from itertools import islice

from gr.config import TrainConfig
from gr.flops import inference_flops, sequence_costs, training_flops
from gr.hstu import kept_history
from gr.memory import RunBytes, run_bytes
from gr.mixture import mixture_groups
from gr.model import dense_model, feature_dims
from gr.report import markdown_table
from gr.sequence import sequence_info
from pipelines.config import StochasticLengthConfig
from pipelines.stream import SessionStream


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one rank's pass over a log, or over its first batches."""

    batches: int
    sequences: int
    tokens: int
    training_flops: int
    """Of the encoder, forward and backward."""
    inference_flops: int
    """Of the encoder's forward pass over the same sequences, none of them shortened."""
    parameters: int
    """Of the dense part."""
    bytes: RunBytes | None
    """At the batch that keeps the most activations; None of other encoders than hstu, whose
    activations torch's operators keep."""
    most_tokens: int
    """Of a batch."""


def cost_of(config: TrainConfig, *, num_batches: int = 0, on_gpu: bool = True) -> Cost:
    """Return what a run costs on one process.

    Args:
        config: of the run.
        num_batches: read so many; 0 means the whole log.
        on_gpu: whether it is trained on a GPU.

    Raises:
        ValueError: if the log cannot be used, or is one of many epochs (data.window=epoch).
    """
    model = config.model
    if config.data.window == "epoch":
        raise ValueError(
            "gr cost reads session-end logs in one pass, but data.window=epoch takes users many "
            "times: a run's metrics.jsonl counts its flops"
        )
    data = replace(config.data, follow=False)
    dense = dense_model(config, feature_dims(config), utc_offset=0)
    parameters = sum(p.numel() for p in dense.parameters())
    groups, keep = mixture_groups(model, data), kept_history(model)
    most: RunBytes | None = None
    batches = sequences = tokens = flops = most_tokens = 0
    stream = SessionStream(data, seed=config.seed, cost=sequence_costs(model))
    for batch in islice(stream, num_batches or None):
        info = sequence_info(batch, keep_history=keep, groups=groups)
        batches, sequences = batches + 1, sequences + batch.num_sequences
        tokens, most_tokens = tokens + batch.num_tokens, max(most_tokens, batch.num_tokens)
        flops += training_flops(model, info)
        if model.encoder == "hstu":
            found = run_bytes(config, info, num_parameters=parameters, on_gpu=on_gpu)
            if most is None or found.activations > most.activations:
                most = found
    return Cost(
        batches=batches,
        sequences=sequences,
        tokens=tokens,
        training_flops=flops,
        inference_flops=flops_of_inference(config, num_batches=num_batches)[0],
        parameters=parameters,
        bytes=most,
        most_tokens=most_tokens,
    )


def flops_of_inference(config: TrainConfig, *, num_batches: int = 0) -> tuple[int, int]:
    """Return the encoder's FLOPs of a forward pass over a log, and the number of sequences.

    Sequences are whole: stochastic length is for training.

    Args:
        config: of the run.
        num_batches: read so many; 0 means the whole log.
    """
    data = replace(config.data, stochastic_length=StochasticLengthConfig(), follow=False)
    groups, keep = mixture_groups(config.model, data), kept_history(config.model)
    stream = SessionStream(data, seed=config.seed, cost=sequence_costs(config.model))
    flops = sequences = 0
    for batch in islice(stream, num_batches or None):
        info = sequence_info(batch, keep_history=keep, groups=groups)
        flops += inference_flops(config.model, info)
        sequences += batch.num_sequences
    return flops, sequences


def describe(cost: Cost) -> str:
    """Return a table for a terminal."""
    each = max(1, cost.sequences)
    rows = [
        ["batches, sequences, tokens", f"{cost.batches:,}, {cost.sequences:,}, {cost.tokens:,}"],
        ["tokens of the largest batch", f"{cost.most_tokens:,}"],
        ["dense parameters", f"{cost.parameters:,}"],
        [
            "training, encoder",
            f"{_flops(cost.training_flops)}, {_flops(cost.training_flops / each)} a sequence",
        ],
        ["inference, encoder", f"{_flops(cost.inference_flops / each)} a sequence, whole"],
    ]
    if cost.bytes is not None:
        b = cost.bytes
        dense = b.parameters + b.gradients + b.optimizer
        rows += [
            ["kept by the encoder for its backward pass, at most", _bytes(b.activations)],
            ["dense parameters, gradients, optimizer", _bytes(dense)],
            ["tables with their moments, device and host", f"{_bytes(b.tables)}, {_bytes(b.host)}"],
        ]
    return markdown_table(["what", "of one process"], rows)


def _flops(x: float) -> str:
    for power, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if x >= power:
            return f"{x / power:.3g} {unit}"
    return f"{x:.0f} FLOP"


def _bytes(x: int) -> str:
    for power, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if x >= power:
            return f"{x / power:.3g} {unit}"
    return f"{x} bytes"
