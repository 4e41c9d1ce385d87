"""One training step, the evaluation before it, and the state that a checkpoint keeps."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)

from embeddings.collection import build_tables
from gr.checkpoint import CheckpointManager
from gr.cold_start import NAME, vectors_key
from gr.config import TrainConfig
from gr.fp8_guard import Fp8Guard
from gr.ids import Catalogue, IdRows
from gr.mixture import mixture_groups
from gr.model import Predictions, SequenceModel, dense_model, feature_dims
from gr.objective import Objective
from gr.optim import DenseUpdates, lr_factor
from gr.outcome import OnTheWay, Outcome
from gr.parallel import World
from gr.progress import NONFINITE_ROWS, NONFINITE_STEPS, NUM_COUNTS, SKIPPED, Progress
from gr.scoring import Scored, Scoring
from gr.sequence import SequenceInfo
from gr.staging import Ahead, StagedBatch, stage
from pipelines.balance import LoadTarget
from pipelines.batch import SequenceBatch
from pipelines.config import ITEM_ID, NEGATIVE_ITEM_ID
from pipelines.rejects import REASONS

EVALUATION = "evaluation"


class Trainer:
    """Model, tables, optimizers and metrics of a run: `train_step` is the body of the loop.

    Args:
        config: of the run.
        world: this process among all.
        utc_offset: seconds to add to a timestamp for local time.
        sequences_per_step: of a global batch, about.
    """

    def __init__(
        self, config: TrainConfig, world: World, *, utc_offset: int, sequences_per_step: int
    ) -> None:
        self.config = config
        self.world = world
        dims = feature_dims(config)
        self.item_table = next(
            name for name, table in config.embeddings.tables.items() if ITEM_ID in table.features
        )
        self.tables = build_tables(
            config.embeddings,
            device=world.device,
            seed=config.seed,
            num_sequences_hint=-(-sequences_per_step // world.size),
            mean_length_hint=max(1.0, config.data.max_history_tokens),
        )
        self.id_rows = IdRows(config, self.tables, self.item_table)
        # After the tables: how much of the generator their form uses must not matter.
        torch.manual_seed(config.seed)
        self.model = dense_model(config, dims, utc_offset).to(world.device)
        self.dense = DenseUpdates(
            self.model, world, config.optim, deterministic=config.deterministic
        )
        self.guard = Fp8Guard(self.model, world)
        self.objective = Objective(config, self.item_table).to(world.device)
        self.scoring = Scoring(config, self.model, self.tables, self.item_table)
        self.evaluation = self.scoring.evaluation
        with_vectors = [*config.model.pretrained, *([NAME] if config.model.cold_start.path else [])]
        vectors = (f"data/without_vector/{name}" for name in with_vectors)
        self.skipped_names = (*SKIPPED, *vectors)
        self.progress = Progress(skipped=[0] * len(self.skipped_names))
        lengths = config.data.stochastic_length
        self.load_target = LoadTarget(lengths.recalibrate_steps) if lengths.balance else None
        self.loss_sums = torch.zeros(
            2, len(self.objective.names), dtype=torch.float64, device=world.device
        )
        self._outcome: Outcome | None = None
        self.has_dropout = config.model.has_dropout
        self.groups = mixture_groups(config.model, config.data)
        self.is_training = False

    @property
    def next_step(self) -> int:
        """The update that a batch belongs to which the stream yields now."""
        return self.progress.step + 1 + self.is_training

    def ahead(self, batches: Iterable[SequenceBatch]) -> Ahead:
        """Return the batches for `train_step` and `score_step`, which then fetch them early."""
        return Ahead(batches, self._stage)

    def train_step(
        self, batch: SequenceBatch | StagedBatch, ahead: Ahead | None = None
    ) -> dict[str, float]:
        """Score the batch (eval.mode=progressive), then learn from it.

        With `ahead` the device may still be at work when this returns: `settle` waits for it, and
        until then `progress` lacks the examples of this step.

        Args:
            batch: this rank's share of a global batch: raw ids on the CPU, or staged.
            ahead: what yielded it; its next batch is brought in the meantime.

        Returns:
            Learning rates of the step.

        Raises:
            ValueError: for an id outside a static table.
            FloatingPointError: if a loss or a gradient is not finite, once more than
                optim.max_nonfinite_steps allows; on all ranks alike.
        """
        self.is_training = True
        try:
            return self._train_step(batch, ahead)
        finally:
            self.is_training = False

    def _train_step(
        self, batch: SequenceBatch | StagedBatch, ahead: Ahead | None
    ) -> dict[str, float]:
        config, world = self.config, self.world
        self._seed_step()
        factor = lr_factor(self.progress.step, config.optim)
        self.dense.set_lr(config.optim.lr * factor)
        self.tables.set_lr(config.embeddings.optimizer.lr * factor)

        staged = batch if isinstance(batch, StagedBatch) else self._stage(batch)
        batch, info, rows = self._arrive(staged)
        # Backward ends here, and goes on into the tables once the losses are known.
        ends = {name: x.detach().requires_grad_(x.requires_grad) for name, x in rows.items()}
        catalogue = self.id_rows.catalogue()
        batch = self._with_content(batch, catalogue)
        learnt = self.id_rows.learnable(batch)
        global_weights = world.sum(self.objective.weights(learnt))
        maps_change = bool(self.id_rows.dynamic.maps)
        if not maps_change:
            # The device may still be at work on the step before: the host's time costs nothing.
            self._bring_next(staged, ahead)
        with self.dense.gradients_of(self.progress.step):
            predictions = self._predict(self.dense.module, batch, info, ends)
            if maps_change:
                # They wait for the step before, by which they were changed.
                self._bring_next(staged, ahead)
            if self.config.optim.accumulate > 1 and self.settle():
                # What backward adds to gradients of batches before could not be taken back.
                predictions = self._predict(self.dense.module, batch, info, ends)
            if ahead is not None:
                ahead.advance()  # its counts have come while this forward pass was launched
            verdict, totals = self._passes(
                batch, info, ends, predictions, learnt, global_weights, catalogue
            )
            is_stale = self.settle()
            while is_stale or self._overflowed_forward(verdict, batch, info, ends):
                self._take_back_score()
                self._forget_gradients(ends)
                predictions = self._predict(self.dense.module, batch, info, ends)
                verdict, totals = self._passes(
                    batch, info, ends, predictions, learnt, global_weights, catalogue
                )
                is_stale = False
            # All ranks decide alike, before backward enters the tables, which are updated in it.
            is_finite = self._check_loss(verdict)
            if not is_finite:
                self._forget_gradients(ends)
        if is_finite:
            _go_on_backward(rows, ends)
        is_due = self.dense.is_due(self.progress.step)
        dense_is_finite = torch.ones((), dtype=torch.bool, device=world.device)
        if is_finite:
            self.dense.add()
            self.tables.optimizer_step()
            self.objective.count_targets(batch)
            self.model.observe(batch)
            self.loss_sums += torch.stack([totals, global_weights])
        elif is_due:
            self.dense.sum_over_ranks()  # this batch has no backward pass that would do it
        self.tables.optimizer_zero_grad()
        self.id_rows.apply(self.objective)
        if is_due:
            dense_is_finite = self.dense.update()

        counts = staged.counts.clone()
        counts[NUM_COUNTS + NONFINITE_ROWS] = self.tables.take_num_nonfinite()
        is_good = dense_is_finite.double()[None] * int(is_finite)
        counts = torch.cat([world.sum(counts), is_good])
        self._outcome = Outcome(OnTheWay(counts), batch.num_sessions)
        if is_finite and self.guard.is_needed:
            self._outcome.to_blame = lambda: self._overflowed_backward(
                batch, info, ends, learnt, global_weights
            )
        self.progress.step += 1
        self.progress.position = batch.position
        if ahead is None:
            self.settle()
        return {
            "lr/dense": config.optim.lr * factor,
            "lr/embeddings": config.embeddings.optimizer.lr * factor,
            **({"train/bf16_layers": len(bf16)} if (bf16 := self.guard.state()) else {}),
        }

    def settle(self) -> bool:
        """Count the last step, whose outcome may not have been waited for.

        Returns:
            Whether a layer was turned from fp8 to bf16, so that a forward pass that has been
            made since must be made again.

        Raises:
            FloatingPointError: if its gradients were not finite, once more than
                optim.max_nonfinite_steps allows; on all ranks alike.
        """
        if self._outcome is None:
            return False
        outcome, self._outcome = self._outcome, None
        load, *counts = outcome.counts.values()
        num_examples, num_tokens, flops, *skipped, is_finite = map(int, counts)
        if self.load_target is not None:
            self.load_target.record(self.progress.step - 1, load, outcome.num_sessions)
        num_bad_rows = skipped[NONFINITE_ROWS]
        is_good = bool(is_finite) and num_bad_rows == 0
        is_excused = not is_good and outcome.to_blame is not None and outcome.to_blame()
        skipped[NONFINITE_STEPS] = int(not (is_good or is_excused))
        self.progress.examples += num_examples
        self.progress.tokens += num_tokens
        self.progress.flops += flops
        self.progress.skipped = [a + b for a, b in zip(self.progress.skipped, skipped, strict=True)]
        self._check_limit(num_bad_rows, bool(is_finite))
        return is_excused

    def _bring_next(self, staged: StagedBatch, ahead: Ahead | None) -> None:
        """Take note of the batch in training, and start to bring the next one."""
        self.id_rows.observe(staged.seen, step=self.progress.step, time=staged.time)
        if ahead is not None:
            ahead.fetch()

    def _passes(
        self,
        batch: SequenceBatch,
        info: SequenceInfo,
        rows: dict[str, Tensor],
        predictions: Predictions,
        learnt: SequenceBatch,
        global_weights: Tensor,
        catalogue: Catalogue,
    ) -> tuple[OnTheWay, Tensor]:
        """Launch what follows a forward pass: loss, scoring, and backward as far as the rows.

        Returns:
            The sum of each loss over all ranks, on its way to the host; the same on the device.
        """
        loss, totals = self._loss(learnt, predictions, global_weights)
        verdict = OnTheWay(totals)
        self._score(batch, info, rows, predictions, catalogue)
        # What is not finite can be taken back, but not out of a sum with batches before.
        if self.config.optim.accumulate == 1 or _are_finite(verdict):
            loss.backward()  # type: ignore[no-untyped-call]
        return verdict, totals

    def _forget_gradients(self, rows: dict[str, Tensor]) -> None:
        """Forget what a backward pass left that does not count."""
        for x in rows.values():
            x.grad = None
        if self.config.optim.accumulate == 1:
            self.dense.forget()
        self.tables.optimizer_zero_grad()

    def _loss(
        self, learnt: SequenceBatch, predictions: Predictions, global_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what backward starts from, and the sum of each loss over all ranks."""
        head = self.model.retrieval if isinstance(self.model, SequenceModel) else None
        sums = self.objective(learnt, predictions, head, self.tables)
        # Gradients are averaged over ranks, sums are not: hence world.size.
        loss = sum(
            factor * sums[name].total * (self.world.size / weight.clamp_min(1e-12))
            for name, factor, weight in zip(
                self.objective.names,
                self.objective.factors,
                global_weights.float(),
                strict=True,
            )
        )
        assert isinstance(loss, Tensor)
        own = [sums[name].total.detach().double() for name in self.objective.names]
        return loss, self.world.sum(torch.stack(own))

    def _overflowed_forward(
        self, totals: OnTheWay, batch: SequenceBatch, info: SequenceInfo, rows: dict[str, Tensor]
    ) -> bool:
        """Return whether a layer in fp8 was to blame, and was turned to bf16: try again."""
        if not self.guard.is_needed or _are_finite(totals):
            return False
        with torch.autocast(self.world.device.type, torch.bfloat16):
            return self.guard.after_forward(lambda: self.model(batch, info, rows))

    def _overflowed_backward(
        self,
        batch: SequenceBatch,
        info: SequenceInfo,
        rows: dict[str, Tensor],
        learnt: SequenceBatch,
        global_weights: Tensor,
    ) -> bool:
        """Return whether a layer in fp8 was to blame for the gradients, and was turned to bf16."""
        rows = {name: x.detach().requires_grad_() for name, x in rows.items()}

        def loss() -> Tensor:
            return self._loss(learnt, self.model(batch, info, rows), global_weights)[0]

        with torch.autocast(self.world.device.type, torch.bfloat16):
            return self.guard.after_backward(loss)

    def skipped_by_name(self) -> dict[str, int]:
        """Return what was left out so far, where anything was."""
        self.settle()
        counts = zip(self.skipped_names, self.progress.skipped, strict=True)
        return {name: n for name, n in counts if n}

    def finish_updates(self) -> None:
        """Update the dense part with batches that no update has used: those at a log's end."""
        self.settle()
        self.dense.sum_over_ranks()
        self.dense.update()

    def take_losses(self) -> dict[str, float]:
        """Return the mean of each loss since the last call, over all ranks, and their sum."""
        totals, weights = self.loss_sums.tolist()
        means = {
            name: total / weight if weight > 0 else float("nan")
            for name, total, weight in zip(self.objective.names, totals, weights, strict=True)
        }
        factors = dict(zip(self.objective.names, self.objective.factors, strict=True))
        seen = {name: mean for name, mean in means.items() if mean == mean}
        self.loss_sums.zero_()
        return {
            "train/loss": sum(factors[name] * mean for name, mean in seen.items()),
            **{f"train/loss/{name}": mean for name, mean in means.items()},
        }

    def score_step(self, batch: SequenceBatch | StagedBatch, ahead: Ahead | None = None) -> None:
        """Add the batch to the metrics, scored with the weights as they are, and learn nothing.

        Args:
            batch: as `train_step` takes it.
            ahead: likewise.

        Raises:
            ValueError: for an id outside a static table.
        """
        self.scoring.add(self.predict_step(batch, ahead))

    @torch.no_grad()
    def predict_step(
        self, batch: SequenceBatch | StagedBatch, ahead: Ahead | None = None
    ) -> Scored:
        """Return what `score_step` adds to the metrics.

        Args:
            batch: as `train_step` takes it.
            ahead: likewise.

        Raises:
            ValueError: for an id outside a static table.
        """
        staged = batch if isinstance(batch, StagedBatch) else self._stage(batch)
        batch, info, rows = self._arrive(staged)
        catalogue = self.id_rows.catalogue()
        batch = self._with_content(batch, catalogue)
        predictions = self._predict_undropped(batch, info, rows)
        if ahead is not None:
            ahead.fetch()
            ahead.advance()
        return self.scoring.of(batch, predictions, catalogue)

    def _stage(self, batch: SequenceBatch) -> StagedBatch:
        vector_rows, without_vector = self.model.find_vectors(batch)
        skipped = [
            *(batch.num_rejected.get(reason, 0) for reason in REASONS),
            *(batch.num_clipped, batch.num_cut_bags, 0, 0),
            *without_vector.values(),
        ]
        return stage(
            replace(batch, vector_rows=vector_rows),
            self.id_rows,
            self.tables,
            model=self.config.model,
            groups=self.groups,
            skipped=skipped,
        )

    def _arrive(self, staged: StagedBatch) -> tuple[SequenceBatch, SequenceInfo, dict[str, Tensor]]:
        """Return the batch on the device, ids mapped to rows; its structure; what is looked up."""
        return staged.arrive(), staged.info, self.tables.lookup(staged.lookup)

    def _with_content(self, batch: SequenceBatch, catalogue: Catalogue) -> SequenceBatch:
        """Return the batch with what it lacks of the content of items: that of negatives."""
        content = self.model.content if isinstance(self.model, SequenceModel) else None
        if content is None or NEGATIVE_ITEM_ID not in batch.ids.keys():  # noqa: SIM118
            return batch
        found = content.find_on_device(catalogue.ids(batch.ids[NEGATIVE_ITEM_ID].values()))
        key = vectors_key(NEGATIVE_ITEM_ID)
        return replace(batch, vector_rows={**batch.vector_rows, key: found})

    def _predict(
        self,
        module: nn.Module,
        batch: SequenceBatch,
        info: SequenceInfo,
        rows: dict[str, Tensor],
    ) -> Predictions:
        is_bf16 = self.config.precision == "bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16, is_bf16):
            predictions: Predictions = module(batch, info, rows)
        return predictions

    @torch.no_grad()
    def _predict_undropped(
        self, batch: SequenceBatch, info: SequenceInfo, rows: dict[str, Tensor]
    ) -> Predictions:
        self.model.eval()
        predictions = self._predict(self.model, batch, info, rows)
        self.model.train()
        return predictions

    @torch.no_grad()
    def _score(
        self,
        batch: SequenceBatch,
        info: SequenceInfo,
        rows: dict[str, Tensor],
        predictions: Predictions,
        catalogue: Catalogue,
    ) -> None:
        """Add a batch that is to be learnt from to the metrics, where that is done."""
        if self.config.eval.mode != "progressive":
            return
        if self.has_dropout:
            predictions = self._predict_undropped(batch, info, rows)
        self.scoring.add(self.scoring.of(batch, predictions, catalogue))

    def _take_back_score(self) -> None:
        if self.config.eval.mode == "progressive":
            self.evaluation.take_back()

    def _seed_step(self) -> None:
        # Dropout is a function of (seed, step, rank): a resumed run repeats it without saved state.
        mixed = (self.config.seed * 1_000_003 + self.progress.step) * 65_537 + self.world.rank
        # torch.manual_seed would keep a record of where it was called for GPUs that are not there.
        torch.default_generator.manual_seed(mixed % (1 << 63))
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(mixed % (1 << 63))

    def _check_loss(self, totals: OnTheWay) -> bool:
        """Return whether the losses are finite; refuse to go on after too many that are not."""
        finite = [math.isfinite(total) for total in totals.values()]
        if all(finite):
            return True
        self._take_back_score()
        if self.progress.nonfinite_steps < self.config.optim.max_nonfinite_steps:
            return False
        names = [n for n, ok in zip(self.objective.names, finite, strict=True) if not ok]
        raise FloatingPointError(
            f"the loss of {names} is not finite at step {self.progress.step}. This batch updated "
            f"nothing. {self._advice()}"
        )

    def _check_limit(self, num_bad_rows: int, dense_is_finite: bool) -> None:
        """Refuse to go on after too many steps whose gradients were not finite."""
        if self.progress.nonfinite_steps <= self.config.optim.max_nonfinite_steps:
            return
        dense = "" if dense_is_finite else f"the dense gradient (norm {self.dense.grad_norm}) and "
        raise FloatingPointError(
            f"{dense}{num_bad_rows} gradient row(s) of tables are not finite at step "
            f"{self.progress.step - 1}: they updated nothing. {self._advice()}"
        )

    def _advice(self) -> str:
        before = self.progress.nonfinite_steps
        return (
            f"It is step {before} of this run that is not finite, and optim.max_nonfinite_steps is "
            f"{self.config.optim.max_nonfinite_steps}. "
            if before > 1
            else ""
        ) + (
            "Lower optim.lr or embeddings.optimizer.lr, add optim.warmup_steps, or look for absurd "
            "values in the labels and dense features of the log."
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; the evaluation by rank, the rest alike on all ranks.

        What counts the steps is a function, which waits for the last one and raises as `settle`
        does, so that what went wrong is not saved; the evaluation is one, too.
        """
        self.evaluation.send()  # now, not behind the copies that a checkpoint will ask for
        return {
            "dense": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.dense.optimizer),
            "tables": self.tables.checkpoint_state(),
            "vocabulary": self.id_rows.checkpoint_state(),
            "objective": self.objective.state_dict(),
            "loss_sums": self.loss_sums,
            EVALUATION: lambda: {f"rank_{self.world.rank}": self.evaluation.state_dict()},
            "progress": self._progress_state,
        }

    def _progress_state(self) -> dict[str, Any]:
        self.settle()
        return {
            **self.progress.state(),
            "loads": self.load_target.state() if self.load_target else [],
            **({"bf16_layers": self.guard.state()} if self.guard.layers else {}),
        }

    def load(self, checkpoints: CheckpointManager, step: int) -> None:
        """Restore a checkpoint that any number of ranks saved.

        Raises:
            ValueError: if it is of another model or not complete.
        """
        stored = self.load_learnt(checkpoints, step)["progress"]
        self.progress = Progress.of_state(stored)
        if self.load_target is not None:
            self.load_target.load_state(stored["loads"])
        num_saved = checkpoints.num_ranks(step)
        for rank in range(self.world.rank, num_saved, self.world.size):
            stored_evaluation = checkpoints.read(step, f"{EVALUATION}.rank_{rank}")
            self.evaluation.merge_state_dict(stored_evaluation)
        if self.world.rank >= num_saved:
            # All ranks close the open window together, those too that have nothing in it.
            window = checkpoints.read(step, f"{EVALUATION}.rank_0")["window"]
            if window.numel():
                self.evaluation.roll(int(window))

    def load_learnt(self, checkpoints: CheckpointManager, step: int) -> dict[str, Any]:
        """Restore weights, optimizers and running losses; progress and evaluation stay.

        Returns:
            The whole state that was read.

        Raises:
            ValueError: if it is of another model or not complete.
        """
        state = self.state()
        checkpoints.load(step, state)
        set_model_state_dict(self.model, state["dense"])
        self.dense.load(state["optimizer"])
        self.tables.load_checkpoint_state(state["tables"])
        self.id_rows.load_checkpoint_state(state["vocabulary"])
        self.objective.load_state_dict(state["objective"])
        self.loss_sums = state["loss_sums"]
        self.guard.load_state(state["progress"].get("bf16_layers", ()))
        return state


def _are_finite(values: OnTheWay) -> bool:
    return all(map(math.isfinite, values.values()))


def _go_on_backward(rows: dict[str, Tensor], ends: dict[str, Tensor]) -> None:
    """Let the gradients at `ends` flow through `rows`; on every rank alike, also where none came.

    Args:
        rows: what was looked up.
        ends: the same, detached, after backward.
    """
    names = [name for name, x in rows.items() if x.requires_grad]
    gradients = [
        torch.zeros_like(x) if x.grad is None else x.grad for x in (ends[name] for name in names)
    ]
    torch.autograd.backward([rows[name] for name in names], gradients)
