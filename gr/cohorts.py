"""Predictions about new items, and of new users: what is scored apart.

Letters: L tokens, P ranking positions, R retrieval positions, E rows of the item table.
"""

import torch
from torch import Tensor, nn

from gr.config import TrainConfig
from gr.tokens import carries_item
from pipelines.batch import SequenceBatch, TokenKind
from pipelines.config import ITEM_ID, TARGET_ITEM_ID
from pipelines.item_times import NEVER, kth_event_times

NEW_ITEMS, NEW_USERS = "new_items", "new_users"


class Cohorts(nn.Module):
    """Which predictions count towards the metrics NAME/new_items and NAME/new_users.

    new_items: the item has fewer than eval.new_item_events events in the log before the time of the
    prediction; what a rank, a resumed run or a batch has seen does not matter. new_users: the
    sequence holds fewer than eval.new_user_events events before the prediction.

    Args:
        config: of the run; the item ids and times of its log are read where new items are wanted.

    Raises:
        ValueError: if the log cannot be read.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        rules, data = config.eval, config.data
        self.new_user_events = rules.new_user_events
        self.kth_time_E: Tensor | None
        if rules.new_item_events:
            times = kth_event_times(data.log, k=rules.new_item_events, num_items=data.num_items)
            # Row 0, the unknown item, is never met: it is always new.
            known = torch.cat([torch.tensor([NEVER]), torch.from_numpy(times)])
            self.register_buffer("kth_time_E", known, persistent=False)
        else:
            self.kth_time_E = None
        self.names = tuple(
            name
            for name, limit in (
                (NEW_ITEMS, rules.new_item_events),
                (NEW_USERS, rules.new_user_events),
            )
            if limit
        )

    def of_ranking(self, batch: SequenceBatch, sequence_L: Tensor) -> dict[str, Tensor]:
        """Return cohort -> (P,) bool.

        Args:
            batch: with rows of the item table as item ids.
            sequence_L: int64, the sequence of each token.
        """
        positions, found = batch.ranking_positions, {}
        if self.kth_time_E is not None:
            item_P = (carries_item(batch.token_kind).cumsum(0) - 1)[positions]
            row_P = batch.ids[ITEM_ID].values()[item_P]
            found[NEW_ITEMS] = batch.timestamp[positions] <= self.kth_time_E[row_P]
        if self.new_user_events:
            first = batch.offsets[sequence_L[positions]]
            found[NEW_USERS] = _num_events(batch, first, positions) < self.new_user_events
        return found

    def of_retrieval(self, batch: SequenceBatch, sequence_L: Tensor) -> dict[str, Tensor]:
        """Return cohort -> (R,) bool; the arguments are those of `of_ranking`."""
        positions, found = batch.retrieval_positions, {}
        if self.kth_time_E is not None:
            row_R = batch.ids[TARGET_ITEM_ID].values()
            found[NEW_ITEMS] = batch.query_time[positions] <= self.kth_time_E[row_R]
        if self.new_user_events:
            first = batch.offsets[sequence_L[positions]]
            # What is read at a token comes after it: its own event is one of those before.
            found[NEW_USERS] = _num_events(batch, first, positions + 1) < self.new_user_events
        return found


def _num_events(batch: SequenceBatch, first_n: Tensor, stop_n: Tensor) -> Tensor:
    """Return (n,) int64: events that a prediction knows, of tokens first .. stop - 1."""
    kind_L = batch.token_kind
    is_event_L = carries_item(kind_L) & (kind_L != TokenKind.CANDIDATE)
    events_L1 = nn.functional.pad(is_event_L.cumsum(0), (1, 0))
    return events_L1[stop_n] - events_L1[first_n]
