"""One way to build the tables of a run, whatever their form."""

import torch
import torch.distributed as dist

from embeddings.config import EmbeddingsConfig
from embeddings.replicated import ReplicatedTables
from embeddings.sharded import ShardedTables
from embeddings.tables import Tables


def build_tables(
    config: EmbeddingsConfig,
    *,
    device: torch.device,
    seed: int,
    num_sequences_hint: int,
    mean_length_hint: float,
    process_group: dist.ProcessGroup | None = None,
) -> Tables:
    """Build the tables in the form that `config.form` names.

    Args:
        config: tables, optimizer and form.
        device: where the tables live.
        seed: of the initial rows.
        num_sequences_hint: sequences of a rank's batch, for the planner of the sharded form.
        mean_length_hint: ids of a sequence in one feature, likewise.
        process_group: ranks that train together; None means the default group, if there is one.

    Raises:
        ValueError: if the form cannot be had on this device.
    """
    form = config.form
    if form == "auto":
        form = "sharded" if device.type == "cuda" else "replicated"
    if form == "sharded":
        return ShardedTables(
            config,
            device=device,
            seed=seed,
            num_sequences_hint=num_sequences_hint,
            mean_length_hint=mean_length_hint,
            process_group=process_group,
        )
    return ReplicatedTables(config, device=device, seed=seed, process_group=process_group)
