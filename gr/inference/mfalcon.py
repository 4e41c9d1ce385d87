"""M-FALCON: many candidates against a history that is computed once.

The history of a request goes through the layers with everything that training puts there, and each
layer's keys and values are kept. Candidates then come in microbatches: each sees the history and
itself, all stand at one position and at one time, so that a score is what a pass of its own would
give, whatever the others are.

Letters: B requests, L tokens, M candidates of all, D width of an item row.

Source: HSTU (arXiv 2402.17152), section 3.4 and appendix H.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr.config import TrainConfig
from gr.hstu import kept_history, tail_index
from gr.inference.cache import KeyValueStore, page_table, pages_for
from gr.inference.requests import Candidates, RequestEncoder, Requests, hide
from gr.inference.stack import Layout, Pass, Rotations, Stack
from gr.mixture import MixtureEncoder, mixture_groups
from gr.model import SequenceModel
from gr.sequence import Before, Group, SequenceInfo, info_of_copy, sequence_info
from kernels.hstu_attention.cached import cache_rows
from pipelines.batch import SequenceBatch
from pipelines.history import Ints

Lookup = Callable[[SequenceBatch], tuple[SequenceBatch, Mapping[str, Tensor]]]
"""A batch of raw ids in host memory -> the batch on the device, and its rows by feature."""

MICROBATCH = 1024


@dataclass(frozen=True)
class Scores:
    """What the model says about candidates."""

    ranking: dict[str, Tensor]
    """Task -> (M,) float32: the logit of a binary task, the transformed value of another; in the
    order of the candidates, request after request."""
    counts: Ints
    """(B,) int64: candidates of each request."""


@dataclass
class StackCache:
    """What one stack of layers keeps of the histories."""

    store: KeyValueStore
    """Holds keys and values."""
    pages: list[list[int]]
    """Of each request."""
    lengths: Ints
    """(layouts, B) int64: tokens in front of the candidates, in each layout."""
    first_time: Ints
    """(B,) int64 s: of the first token."""


@dataclass
class EncodedHistory:
    """Requests whose histories went through the model."""

    requests: Requests
    user_vectors: Tensor | None
    """(B, item dim) float32, for retrieval: to be compared with SequenceModel.item_vectors. None
    without a retrieval head; zeros where `has_history` is false."""
    has_history: Tensor
    """(B,) bool: whether there is an event to predict from."""
    stacks: list[StackCache]
    """Of the encoder; of a mixture one each."""
    before: Before
    """The whole sequences in front of the candidates, without their context tokens."""
    session_start: Tensor
    """(B,) int64: index of the first token of the session, which the candidates are of."""


class Scorer:
    """Scores candidates and makes user vectors with the weights of a model.

    Args:
        config: of the run that trained it.
        model: the dense part.
        lookup: brings a batch to the device with its rows; `trainer_lookup` makes one of a trainer.
        device: of the model.

    Raises:
        ValueError: if the model does not read sequences (model.encoder=dlrm).
    """

    def __init__(
        self, config: TrainConfig, model: SequenceModel, lookup: Lookup, device: torch.device
    ) -> None:
        if not isinstance(model, SequenceModel):
            raise ValueError(
                "a Scorer caches histories, which model.encoder=dlrm does not read: score its "
                "batches as evaluation does"
            )
        self.config, self.model, self.lookup, self.device = config, model, lookup, device
        self.encoder = RequestEncoder(config.data)
        is_bf16 = config.precision == "bf16"
        self.dtype = torch.bfloat16 if is_bf16 else next(model.encoder.parameters()).dtype
        encoders = [model.encoder]
        if isinstance(model.encoder, MixtureEncoder):
            encoders = list(model.encoder.stacks.values())
        self.stacks = [Stack(encoder, self.dtype) for encoder in encoders]
        self.groups = mixture_groups(config.model, config.data)
        self.keep_history = kept_history(config.model)
        self.windowed_candidates = config.data.anchor == "event"

    def refresh(self) -> None:
        """Read the weights anew: to be called when they have changed."""
        for stack in self.stacks:
            stack.refresh()

    def encode_history(self, requests: Requests) -> EncodedHistory:
        """Return the requests' histories, encoded: user vectors, and what `score` reads.

        Raises:
            ValueError: for an id outside a static table.
        """
        with self._evaluating():
            return self._encode(requests)

    def score(
        self,
        history: EncodedHistory,
        candidates: Candidates,
        *,
        microbatch: int = MICROBATCH,
    ) -> Scores:
        """Return the scores of candidates, each as if it were alone.

        Args:
            history: of the requests that the candidates are for.
            candidates: RequestEncoder.candidates of them.
            microbatch: candidates of a request that go through the layers together.

        Raises:
            ValueError: if the model ranks nothing, the candidates are of other requests, the
                microbatch is not positive, or an id is outside a static table.
        """
        if self.model.ranking is None:
            raise ValueError(
                "the model has no ranking head (data.tasks is empty): compare the user vectors "
                "with item vectors instead"
            )
        if microbatch < 1:
            raise ValueError(f"microbatch must be at least 1, got {microbatch}")
        if len(candidates.counts) != history.requests.num_requests:
            raise ValueError(
                f"candidates are of {len(candidates.counts)} requests, the histories of "
                f"{history.requests.num_requests}"
            )
        with self._evaluating():
            return self._score(history, candidates, microbatch)

    def _encode(self, requests: Requests) -> EncodedHistory:
        batch = self.encoder.batch(requests, self.encoder.no_item(requests))
        host = _info(batch, keep_history=self.keep_history, groups=self.groups)
        x_LD, info = self._tokens(batch, host)
        y_RD, stacks = [], []
        for stack, own, own_host, tokens in self._parts(info, host):
            x_TD = x_LD if tokens is None else x_LD.index_select(0, tokens)
            y, cache = self._fill(stack, x_TD, own, own_host)
            y_RD.append(y)
            stacks.append(cache)
        has_history = torch.from_numpy(requests.counts > 0).to(self.device)
        vectors = None
        if self.model.retrieval is not None:
            # The tail of a sequence: its last token, then the unknown item; or the latter alone.
            last_B = (info.tail_offsets[1:] - 2).clamp(min=0)
            rows = torch.cat(y_RD, 1).index_select(0, last_B)
            vectors = self.model.retrieval(rows) * has_history[:, None]
        last_B = batch.offsets[1:] - 2
        return EncodedHistory(
            requests=requests,
            user_vectors=vectors,
            has_history=has_history,
            stacks=stacks,
            before=Before(
                num_tokens=batch.lengths - 1 - batch.num_context,
                first_time=batch.timestamp[batch.offsets[:-1]],
                last_time=batch.timestamp[last_B.clamp(min=0)],
            ),
            session_start=batch.session_start,
        )

    def _parts(
        self, info: SequenceInfo, host: SequenceInfo
    ) -> list[tuple[Stack, SequenceInfo, SequenceInfo, Tensor | None]]:
        """Return each stack, the structure of what it reads, twice as given, and its tokens."""
        if not self.groups:
            return [(self.stacks[0], info, host, None)]
        return [
            (stack, own.info, own_host.info, own.tokens)
            for stack, own, own_host in zip(self.stacks, info.groups, host.groups, strict=True)
        ]

    def _fill(
        self, stack: Stack, x_LD: Tensor, info: SequenceInfo, host: SequenceInfo
    ) -> tuple[Tensor, StackCache]:
        """Return a stack's rows of the tails, and the keys and values of all but the last token."""
        lengths_B = host.offsets.diff() - 1  # without the unknown item behind them
        kept_B = lengths_B
        if self.keep_history:
            dropped_B = host.session_start - host.num_context - self.keep_history
            kept_B = lengths_B - dropped_B.clamp(min=0)
        lengths = torch.stack([lengths_B, kept_B][: stack.layouts])
        pages = [pages_for(int(n)) for n in lengths_B]
        store = KeyValueStore(
            stack.shapes,
            sum(pages),
            dtype=self.dtype,
            device=self.device,
            layouts=stack.layouts,
        )
        mine = [store.allocate(n) for n in pages]
        table = page_table(mine)
        layouts = tuple(
            self._kept(number, table, torch.zeros_like(lengths_B), counts_B)
            for number, counts_B in enumerate(lengths)
        )
        given = Pass(
            info=info,
            rotations=stack.rotations(x_LD.to(self.dtype), info),
            pages=table.to(self.device),
            layouts=layouts,
            tail=tail_index(info),
        )
        first_time = host.timestamp[host.offsets[:-1]].numpy()
        y_RD = stack.run(x_LD, given, store)
        return y_RD, StackCache(store, mine, lengths.numpy(), first_time)

    def _kept(self, number: int, table: Tensor, first_B: Tensor, counts_B: Tensor) -> Layout:
        """Return a layout into which the first counts_B of each sequence's new tokens go.

        The tokens that follow them, one unknown item each, are not kept.
        """
        total = int(counts_B.sum())
        sequence = torch.repeat_interleave(torch.arange(len(counts_B)), counts_B, output_size=total)
        return Layout(
            number=number,
            lengths=first_B.to(self.device),
            max_len=int(first_B.max()) if len(first_B) else 0,
            keep=(torch.arange(total) + sequence).to(self.device),
            rows=cache_rows(table, first_B, counts_B, total).to(self.device),
        )

    def _score(self, history: EncodedHistory, candidates: Candidates, microbatch: int) -> Scores:
        asked = np.flatnonzero(candidates.counts > 0)
        all_counts, candidates = (
            candidates.counts,
            replace(candidates, counts=candidates.counts[asked]),
        )
        names = self.config.data.tasks
        if not len(asked):
            nothing = torch.zeros(0, device=self.device)
            return Scores(dict.fromkeys(names, nothing), all_counts)
        if self.encoder.encoder.merges_context:
            # What the context adds stands in front of them, and is cached.
            candidates = replace(candidates, ints=candidates.ints.copy())
            for slot in self.encoder.encoder.series_slots:
                hide(candidates.ints, slot)
        batch = self.encoder.batch(history.requests.without_events(asked), candidates)
        before = history.before.of(torch.from_numpy(asked))
        host = replace(
            _info(batch),
            session_start=history.session_start[asked] - before.num_tokens,
            before=before,
        )
        x_LD, info = self._tokens(batch, host)
        caches = [
            self._cached(stack, cache, asked, x_LD, info)
            for stack, cache in zip(self.stacks, history.stacks, strict=True)
        ]
        first_B = batch.offsets[:-1] + batch.num_context
        order, found = [], []
        for begin in range(0, int(candidates.counts.max()), microbatch):
            counts = np.clip(candidates.counts - begin, 0, microbatch)
            rows_R, part = _rows(info, first_B + begin, torch.from_numpy(counts))
            order.append(rows_R)
            rows_R = rows_R.to(self.device)
            x_RD = x_LD.index_select(0, rows_R)
            y_RD = [
                stack.run(
                    x_RD,
                    Pass(
                        info=part,
                        rotations=_select(turned, rows_R),
                        pages=table,
                        layouts=layouts,
                        windowed_candidates=self.windowed_candidates,
                    ),
                    cache.store,
                )
                for stack, cache, (table, layouts, turned) in zip(
                    self.stacks, history.stacks, caches, strict=True
                )
            ]
            assert self.model.ranking is not None
            found.append(self.model.ranking(torch.cat(y_RD, 1)))
        place = torch.cat(order).argsort().to(self.device)
        ranking = {name: torch.cat([x[name] for x in found])[place] for name in names}
        return Scores(ranking, all_counts)

    def _cached(
        self, stack: Stack, cache: StackCache, asked: Ints, x_LD: Tensor, info: SequenceInfo
    ) -> tuple[Tensor, tuple[Layout, ...], Rotations | None]:
        """Return pages, layouts and rotations of candidates behind a stack's cache."""
        table = page_table([cache.pages[b] for b in asked]).to(self.device)
        lengths = torch.from_numpy(cache.lengths[:, asked])
        layouts = tuple(
            Layout(number, x.to(self.device), int(x.max())) for number, x in enumerate(lengths)
        )
        first_time = torch.from_numpy(cache.first_time[asked])
        before = Before(lengths[0] - info.num_context, first_time, first_time).to(self.device)
        turned = stack.rotations(x_LD.to(self.dtype), replace(info, before=before))
        return table, layouts, turned

    def _tokens(self, batch: SequenceBatch, host: SequenceInfo) -> tuple[Tensor, SequenceInfo]:
        """Return the tokens' vectors and their structure, on the device."""
        model = self.model
        batch, rows = self.lookup(batch)
        device = batch.offsets.device
        info = info_of_copy(host, batch, lambda x: x.to(device))
        before = None if host.before is None else host.before.to(device)
        info = replace(info, session_start=host.session_start.to(device), before=before)
        if model.content is not None:
            rows = model.content.add(batch, rows)
        return model.encoding(model.tokens(batch, rows), info), info

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluate as the trainer does: no gradient, no dropout, the run's precision."""
        was_training = self.model.training
        self.model.eval()
        is_bf16 = self.config.precision == "bf16"
        try:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, is_bf16):
                yield
        finally:
            self.model.train(was_training)


def trainer_lookup(trainer: Any) -> Lookup:
    """Return the lookup of a gr.trainer.Trainer, whose tables must be of one process."""

    def lookup(batch: SequenceBatch) -> tuple[SequenceBatch, Mapping[str, Tensor]]:
        vector_rows, _ = trainer.model.find_vectors(batch)
        batch = replace(batch, vector_rows=vector_rows)
        batch, is_event = trainer.id_rows.rows_on_host(batch)
        device = trainer.tables.device
        batch = batch.to(device)
        is_event = {name: x.to(device) for name, x in is_event.items()}
        batch, _ = trainer.id_rows.rows_on_device(batch, is_event)
        return batch, trainer.tables.lookup(batch.ids)

    return lookup


def _info(
    batch: SequenceBatch, *, keep_history: int = 0, groups: Sequence[Group] = ()
) -> SequenceInfo:
    """Return the structure of a batch in host memory; a tail is the last token and the candidates.

    The candidates are in it too. That last token is read as training reads it for retrieval.
    """
    first_B = batch.offsets[1:] - batch.num_candidates
    has_one_B = batch.lengths > batch.num_candidates
    positions = torch.cat([first_B, first_B[has_one_B] - 1])
    read = replace(batch, ranking_positions=positions, retrieval_positions=positions[:0])
    return sequence_info(read, keep_history=keep_history, groups=groups)


def _rows(info: SequenceInfo, first_B: Tensor, counts_B: Tensor) -> tuple[Tensor, SequenceInfo]:
    """Return the index of some candidates, in host memory, and their structure on the device.

    Args:
        info: of the batch, on the device.
        first_B: int64 in host memory: first token of each sequence.
        counts_B: int64 in host memory: tokens from there on.
    """
    total, device = int(counts_B.sum()), info.offsets.device
    offsets = torch.zeros(len(counts_B) + 1, dtype=torch.int64)
    offsets[1:] = counts_B.cumsum(0)
    shift_R = torch.repeat_interleave(first_B - offsets[:-1], counts_B, output_size=total)
    rows_R = shift_R + torch.arange(total)
    on_device = rows_R.to(device)
    longest = int(counts_B.max()) if len(counts_B) else 0
    part = SequenceInfo(
        offsets=offsets.to(device),
        tail_offsets=offsets.to(device),
        max_len=longest,
        max_tail_len=longest,
        timestamp=info.timestamp[on_device],
        query_time=info.query_time[on_device],
        session_start=torch.zeros_like(counts_B).to(device),
        num_context=info.num_context,
        num_candidates=counts_B.to(device),
        num_rows=total,
    )
    return rows_R, part


def _select(turned: Rotations | None, rows_R: Tensor) -> Rotations | None:
    return None if turned is None else (turned[0].rows(rows_R), turned[1].rows(rows_R))
