"""M-FALCON: many candidates against a history that is computed once.

The history of a request goes through the layers with everything that training puts there, and each
layer's keys and values are kept. Candidates then come in microbatches: each sees the history and
itself, all stand at one position and at one time, so that a score is what a pass of its own would
give, whatever the others are. Where keys and values stay what they are as the user goes on
(`prefix_stable`), they are kept for the next request, which computes the new events only.

Letters: B requests, L tokens, M candidates of all, D width of an item row.

Source: HSTU (arXiv 2402.17152), section 3.4 and appendix H.
"""

import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gr.config import TrainConfig
from gr.hstu import kept_history
from gr.inference.encoded import (
    Behind,
    EncodedHistory,
    Part,
    behind_cache,
    candidate_pass,
    history_end,
    history_pass,
    item_rows,
    new_tokens,
    part_of,
    read_structure,
)
from gr.inference.encoded import Scores as Scores
from gr.inference.graphs import PassGraphs, runs_alike
from gr.inference.lookup import Lookup as Lookup
from gr.inference.lookup import trainer_lookup as trainer_lookup
from gr.inference.next_requests import NextRequests, local_rows
from gr.inference.passes import Passes
from gr.inference.plan import Plan
from gr.inference.prefix import why_unstable
from gr.inference.requests import Candidates, RequestEncoder, Requests
from gr.inference.series import hide
from gr.inference.stack import Pass, tokens_within
from gr.inference.users import UserCache
from gr.mixture import mixture_groups
from gr.model import SequenceModel
from pipelines.history import Ints

MICROBATCH = 1024
"""Candidates of a request that go through the layers together."""
MICROBATCH_ON_GPU = 16384
"""From 2,048 on attention is the causal kernel's (gr/inference/tails.py), for which the history is
laid out once a microbatch."""
Scored = tuple[Ints, dict[str, Tensor]]
"""Which candidates, and of each task their scores."""


class Scorer:
    """Scores candidates and makes user vectors with the weights of a model.

    Args:
        config: of the run that trained it.
        model: the dense part.
        lookup: brings a batch to the device with its rows; `trainer_lookup` makes one of a trainer.
        device: of the model.
        cache_bytes: memory for keys and values of users from one request to the next, all taken at
            once. 0: histories are encoded anew for each request, as they are in any case where
            `prefix_stable` does not hold; EncodedHistory.reasons says so.
        graphs: on a GPU with cache_bytes, requests that come one at a time run as CUDA graphs, each
            captured when passes of its size come for the second time.

    Raises:
        ValueError: if the model does not read sequences (model.encoder=dlrm), or the memory holds
            no page.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: SequenceModel,
        lookup: Lookup,
        device: torch.device,
        *,
        cache_bytes: int = 0,
        graphs: bool = True,
    ) -> None:
        if not isinstance(model, SequenceModel):
            raise ValueError(
                "a Scorer caches histories, which model.encoder=dlrm does not read: score its "
                "batches as evaluation does"
            )
        self.config, self.model, self.lookup, self.device = config, model, lookup, device
        self.encoder = RequestEncoder(config.data)
        self.passes = Passes(config, model, lookup, device)
        self.dtype, self.stacks = self.passes.dtype, self.passes.stacks
        self.groups = mixture_groups(config.model, config.data)
        self.keep_history = kept_history(config.model)
        self.windowed_candidates = config.data.anchor == "event"
        self.unstable = why_unstable(config)
        """What keeps histories from being cached across requests; "": nothing."""
        self.users: UserCache | None = None
        if cache_bytes:
            self.users = UserCache(
                self.passes.new_stores([tokens_within(cache_bytes, self.stacks)]),
                has_context=config.data.context == "prefix",
            )
        self.next: NextRequests | None = None
        """What answers cached users in one graph, where that can be."""
        if self.users is not None and graphs and device.type == "cuda":
            stores = self.users.stores
            self.passes.graphs = [
                PassGraphs(*each) for each in zip(self.stacks, stores, strict=True)
            ]
            rows = local_rows(config, model, self.encoder, lookup, self.stacks)
            if rows is not None and not self.unstable:
                self.next = NextRequests(
                    model,
                    self.encoder,
                    self.stacks[0],
                    stores[0],
                    rows,
                    windowed=self.windowed_candidates,
                    evaluating=self.passes.evaluating,
                )

    def refresh(self) -> None:
        """Read the weights anew and forget cached users; to be called when they have changed."""
        self.passes.refresh()
        if self.next is not None:
            self.next.clear()
        if self.users is not None:
            self.users.clear()

    def encode_history(self, requests: Requests) -> EncodedHistory:
        """Return the requests' histories, encoded: user vectors, and what `score` reads.

        While the result is alive, so is what it holds of the cache.

        Raises:
            ValueError: for an id outside a static table.
        """
        with torch.no_grad():
            return self._encode(requests, None, 0)[0]

    def answer(
        self, requests: Requests, candidates: Candidates, *, microbatch: int | None = None
    ) -> tuple[EncodedHistory, Scores]:
        """Return what `encode_history` and then `score` return, in fewer passes.

        New events behind cached ones go through the layers together with the first microbatch of
        their candidates.

        Args:
            requests: the requests.
            candidates: RequestEncoder.candidates of them.
            microbatch: as of `score`.

        Raises:
            ValueError: as both of them.
        """
        microbatch = self._checked(requests, candidates, microbatch)
        with torch.no_grad():
            history, scored = self._encode(requests, candidates, microbatch)
            return history, self._score(history, candidates, microbatch, scored)

    def score(
        self,
        history: EncodedHistory,
        candidates: Candidates,
        *,
        microbatch: int | None = None,
    ) -> Scores:
        """Return the scores of candidates, each as if it were alone.

        Args:
            history: of the requests that the candidates are for.
            candidates: RequestEncoder.candidates of them.
            microbatch: candidates of a request that go through the layers together; None: 16,384 on
                a GPU, 1,024 elsewhere.

        Raises:
            ValueError: if the model ranks nothing, the candidates are of other requests, the
                microbatch is not positive, or an id is outside a static table.
        """
        microbatch = self._checked(history.requests, candidates, microbatch)
        with torch.no_grad():
            return self._score(history, candidates, microbatch, [])

    def _checked(self, requests: Requests, candidates: Candidates, microbatch: int | None) -> int:
        """Return the size of microbatches."""
        if microbatch is None:
            microbatch = MICROBATCH_ON_GPU if self.device.type == "cuda" else MICROBATCH
        if self.model.ranking is None:
            raise ValueError(
                "the model has no ranking head (data.tasks is empty): compare the user vectors "
                "with item vectors instead"
            )
        if microbatch < 1:
            raise ValueError(f"microbatch must be at least 1, got {microbatch}")
        if len(candidates.counts) != requests.num_requests:
            raise ValueError(
                f"candidates are of {len(candidates.counts)} requests, the histories of "
                f"{requests.num_requests}"
            )
        return microbatch

    def _encode(
        self, requests: Requests, candidates: Candidates | None, microbatch: int
    ) -> tuple[EncodedHistory, list[Scored]]:
        """Return the histories, and the candidates that were scored with them."""
        plan = Plan(self.encoder, requests, self.users, self.unstable)
        parts, vectors, scored = [], [], []
        try:
            for chosen in plan.groups():
                items = None
                if candidates is not None and plan.users_of(chosen):
                    counts = candidates.counts[chosen]
                    if counts.min() > 0 and counts.max() <= min(microbatch, MICROBATCH):
                        items = candidates.of(chosen)
                part, own, ranking = self._encode_part(plan, chosen, items)
                parts.append(part)
                if items is not None and candidates is not None:
                    scored.append((candidates.rows_of(chosen), ranking))
                    part.is_scored = True
                if own is not None:
                    vectors.append(own)
        except BaseException:
            plan.release()
            raise
        history = EncodedHistory(
            requests=requests,
            user_vectors=None,
            reused=plan.reused,
            reasons=plan.reasons,
            parts=parts,
        )
        weakref.finalize(history, plan.release)
        if len(vectors) > 1:
            order = torch.from_numpy(np.concatenate([x.chosen for x in parts])).argsort()
            vectors = [torch.cat(vectors)[order.to(self.device)]]
        if vectors:
            history.user_vectors = vectors[0]
            if not requests.counts.all():
                history.user_vectors = vectors[0] * history.has_history.to(self.device)[:, None]
        return history, scored

    def _encode_part(
        self, plan: Plan, chosen: Ints, items: Candidates | None
    ) -> tuple[Part, Tensor | None, dict[str, Tensor]]:
        """Return requests of one group of the plan, user vectors, and what ranking says of items.

        Args:
            plan: of all requests.
            chosen: the group.
            items: behind what is cached; None: an unknown one behind each history.
        """
        requests, users = plan.requests.of(chosen), plan.users_of(chosen)
        is_asked = items is not None and self.model.ranking is not None
        items = self.encoder.no_item(requests) if items is None else items
        if users:
            first = np.array([len(x.ints) for x in users])
            requests, items = self.encoder.after(requests, first, [x.known for x in users], items)
        if users and self.next is not None:
            size = self.next.takes(users, requests, items)
            if size is not None:
                pages = plan.pages_of(chosen, self.passes.new_stores)[1][0]
                found = self.next.run(size, chosen, users, pages, requests, items)
                if found is not None:
                    plan.keep_next(chosen, requests)
                    return found
        with self.passes.evaluating():
            return self._through_layers(plan, chosen, requests, items, is_asked=is_asked)

    def _through_layers(
        self,
        plan: Plan,
        chosen: Ints,
        requests: Requests,
        items: Candidates,
        *,
        is_asked: bool,
    ) -> tuple[Part, Tensor | None, dict[str, Tensor]]:
        """Return what `_encode_part` does of requests, or what follows their cached events."""
        users = plan.users_of(chosen)
        stores, pages = plan.pages_of(chosen, self.passes.new_stores)
        before = behind_cache(users, self.encoder.num_context) if users else None
        batch = self.encoder.batch(requests, items)
        host = read_structure(
            batch, before=before, keep_history=self.keep_history, groups=self.groups
        )
        x_LD = self.passes.tokens(batch, host)
        new = new_tokens(host, users)
        y_RD, y_MD, caches, windowed = [], [], [], self.windowed_candidates
        for stack, mine, store, own in zip(self.stacks, new, stores, pages, strict=True):
            given, cache, rows = history_pass(mine, store, own, stack.layouts, windowed=windowed)
            x_RD = x_LD if not self.groups and not users else self.passes.rows(x_LD, mine.tokens)
            y = self.passes.run(stack, x_RD, given, store)
            y_RD.append(self.passes.rows(y, rows))
            y_MD.append(self.passes.rows(y, item_rows(given)))
            caches.append(cache)
        behind = Behind(caches, *history_end(batch, before))
        part = Part(chosen, lambda: behind)
        plan.keep(chosen, batch, new, part)
        vectors = None
        if self.model.retrieval is not None:
            vectors = self.model.retrieval(torch.cat(y_RD, 1))
        return part, vectors, self._ranked(torch.cat(y_MD, 1)) if is_asked else {}

    def _ranked(self, y_MD: Tensor) -> dict[str, Tensor]:
        assert self.model.ranking is not None
        ranking: dict[str, Tensor] = self.model.ranking(y_MD)
        return ranking

    def _score(
        self,
        history: EncodedHistory,
        candidates: Candidates,
        microbatch: int,
        scored: list[Scored],
    ) -> Scores:
        """Return the scores of all candidates; those of `scored` are there already."""
        if len(scored) == 1 and len(scored[0][0]) == candidates.counts.sum():
            return Scores(scored[0][1], candidates.counts)
        is_answer = bool(scored)
        for part in history.parts:
            asked = np.flatnonzero(candidates.counts[part.chosen] > 0)
            if len(asked) and not (is_answer and part.is_scored):
                chosen = part.chosen[asked]
                items, mine = candidates.rows_of(chosen), candidates.of(chosen)
                with self.passes.evaluating():
                    made = list(self._score_part(history, part, asked, mine, microbatch))
                    ranking = self._ranked(torch.cat([y for _, y in made]))
                rows = torch.cat([rows for rows, _ in made]).numpy()
                scored = [*scored, (items[rows], ranking)]
        names = self.config.data.tasks
        if not scored:
            nothing = torch.zeros(0, device=self.device)
            return Scores(dict.fromkeys(names, nothing), candidates.counts)
        if len(scored) == 1:
            ranking = scored[0][1]
        else:
            ranking = {name: torch.cat([x[name] for _, x in scored]) for name in names}
        order = np.concatenate([items for items, _ in scored])
        if (order[1:] < order[:-1]).any():
            place = torch.from_numpy(order).argsort().to(self.device)
            ranking = {name: x[place] for name, x in ranking.items()}
        return Scores(ranking, candidates.counts)

    def _score_part(
        self,
        history: EncodedHistory,
        part: Part,
        asked: Ints,
        candidates: Candidates,
        microbatch: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield which of the candidates a microbatch has, and their rows of the encoder."""
        if self.encoder.encoder.merges_context:
            # What the context adds stands in front of them, and is cached.
            candidates = replace(candidates, ints=candidates.ints.copy())
            for slot in self.encoder.encoder.series_slots:
                hide(candidates.ints, slot)
        requests = history.requests.without_events(part.chosen[asked])
        batch = self.encoder.batch(requests, candidates)
        rows_B = torch.from_numpy(asked)
        before = part.behind.before.of(rows_B)
        info = replace(
            read_structure(batch, before=before),
            session_start=part.behind.session_start[rows_B] - before.num_tokens,
        )
        x_LD = self.passes.tokens(batch, info)
        first_B = batch.offsets[:-1] + batch.num_context
        starts_B = torch.from_numpy(np.cumsum(candidates.counts) - candidates.counts)
        passes: list[Pass] = []
        last_B = torch.zeros(0)
        begin, runs = 0, 0
        while begin < int(candidates.counts.max()):
            counts_B = torch.from_numpy(np.clip(candidates.counts - begin, 0, microbatch))
            rows_R, mine = part_of(info, first_B + begin, counts_B)
            if not torch.equal(counts_B, last_B):  # else all but the items is what it was
                passes, last_B = [], counts_B
                for cache in part.behind.stacks:
                    given = candidate_pass(mine, cache, rows_B, windowed=self.windowed_candidates)
                    passes.append(given)
            runs = runs_alike(candidates.counts, begin, microbatch) if self.passes.graphs else 1
            if runs > 1:  # of one request: its items follow one another
                rows_R = torch.arange(runs * microbatch) + rows_R[0]
            x_RD = self.passes.rows(x_LD, rows_R)
            y_RD = [
                self.passes.run(stack, x_RD, given, cache.store, runs)
                for stack, given, cache in zip(self.stacks, passes, part.behind.stacks, strict=True)
            ]
            begin += runs * microbatch
            shift_R = torch.repeat_interleave(first_B - starts_B, runs * counts_B)
            yield rows_R - shift_R, torch.cat(y_RD, 1) if len(y_RD) > 1 else y_RD[0]
