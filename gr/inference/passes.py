"""Batches through the dense part, as the trainer evaluates them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from gr.config import TrainConfig
from gr.inference.cache import KeyValueStore, pages_for
from gr.inference.graphs import PassGraphs
from gr.inference.lookup import Lookup
from gr.inference.stack import Pass, Stack
from gr.mixture import MixtureEncoder
from gr.model import SequenceModel
from gr.sequence import SequenceInfo, info_of_copy
from pipelines.batch import SequenceBatch


class Passes:
    """The layers of a model, in one stack or several, and what comes before them.

    Args:
        config: of the run.
        model: the dense part.
        lookup: brings a batch to the device with its rows.
        device: of the model.
    """

    def __init__(
        self, config: TrainConfig, model: SequenceModel, lookup: Lookup, device: torch.device
    ) -> None:
        self.config, self.model, self.lookup, self.device = config, model, lookup, device
        is_bf16 = config.precision == "bf16"
        self.dtype = torch.bfloat16 if is_bf16 else next(model.encoder.parameters()).dtype
        encoders = [model.encoder]
        if isinstance(model.encoder, MixtureEncoder):
            encoders = list(model.encoder.stacks.values())
        self.stacks = [Stack(encoder, self.dtype) for encoder in encoders]
        self.graphs: list[PassGraphs] = []
        """Of passes that read or keep what their store holds."""

    def refresh(self) -> None:
        """Read the weights anew."""
        for stack in self.stacks:
            stack.refresh()
        for graphs in self.graphs:
            graphs.clear()

    def run(
        self, stack: Stack, x_RD: Tensor, given: Pass, store: KeyValueStore, runs: int = 1
    ) -> Tensor:
        """Return what Stack.run does of a pass in host memory, as a graph if it can be one.

        Args:
            stack: the layers.
            x_RD: on the device; the tokens of all passes.
            given: the pass.
            store: what it reads and keeps is there.
            runs: passes that differ in their tokens only.
        """
        graphs = next((x for x in self.graphs if x.store is store), None)
        if graphs is not None and graphs.takes(given, runs):
            return graphs.run(x_RD, given, runs)
        if runs > 1:
            return torch.cat([self.run(stack, x, given, store) for x in x_RD.chunk(runs)])
        return stack.run(x_RD, given.to(self.device), store)

    def rows(self, x_LD: Tensor, rows: Tensor) -> Tensor:
        """Return some tokens, (n,) int64 on the host."""
        first, count = int(rows[0]) if len(rows) else 0, len(rows)
        if count and int(rows[-1]) - first + 1 == count:  # they ascend: no index has to travel
            return x_LD[first : first + count]
        return x_LD.index_select(0, rows.to(self.device))

    def tokens(self, batch: SequenceBatch, host: SequenceInfo) -> Tensor:
        """Return (L, D): the tokens as the first layer reads them."""
        model = self.model
        batch, rows = self.lookup(batch)
        device = batch.offsets.device
        info = info_of_copy(replace(host, groups=()), batch, lambda x: x.to(device))
        before = None if host.before is None else host.before.to(device)
        info = replace(info, session_start=host.session_start.to(device), before=before)
        if model.content is not None:
            rows = model.content.add(batch, rows)
        x_LD: Tensor = model.encoding(model.tokens(batch, rows), info)
        return x_LD

    def new_stores(self, num_tokens: Sequence[int]) -> list[KeyValueStore]:
        """Return a store of each stack with room for sequences of so many tokens."""
        pages = 1 + sum(pages_for(n) for n in num_tokens)
        return [stack.new_store(pages, self.device) for stack in self.stacks]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluate as the trainer does: no gradient, no dropout, the run's precision."""
        was_training = self.model.training
        if was_training:
            self.model.eval()
        is_bf16 = self.config.precision == "bf16"
        try:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, is_bf16):
                yield
        finally:
            if was_training:
                self.model.train()
