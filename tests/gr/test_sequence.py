"""Tails and the rows in them, against plain Python."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.sequence import sequence_index, sequence_info, tail_index, tail_rows


@st.composite
def sequences(draw):
    """Return (length, ranking places, retrieval places) of each sequence; places may repeat."""
    drawn = []
    for length in draw(st.lists(st.integers(0, 6), max_size=5)):
        places = st.lists(st.integers(0, length - 1), max_size=4) if length else st.just([])
        drawn.append((length, sorted(set(draw(places))), sorted(draw(places))))
    return drawn


def make_batch(drawn):
    offsets = [sum(length for length, _, _ in drawn[:b]) for b in range(len(drawn) + 1)]
    start = dict(enumerate(offsets))

    def positions(which):
        return torch.tensor(
            [start[b] + p for b, s in enumerate(drawn) for p in s[which]], dtype=torch.int64
        )

    num_tokens = offsets[-1]
    return SimpleNamespace(
        offsets=torch.tensor(offsets),
        lengths=torch.tensor(offsets).diff(),
        num_tokens=num_tokens,
        max_len=max((s[0] for s in drawn), default=0),
        ranking_positions=positions(1),
        retrieval_positions=positions(2),
        timestamp=torch.arange(num_tokens),
        query_time=torch.arange(num_tokens) + 1,
        session_start=torch.zeros(len(drawn), dtype=torch.int64),
        num_context=0,
        num_candidates=torch.zeros(len(drawn), dtype=torch.int64),
    )


@settings(deadline=None, max_examples=60)
@given(sequences())
def test_a_tail_starts_at_the_first_position_read(drawn):
    batch = make_batch(drawn)
    info = sequence_info(batch)
    tails = [length - min([length, *a, *b]) for length, a, b in drawn]
    assert info.tail_offsets.diff().tolist() == tails
    assert info.tail_offsets[0] == 0
    assert info.max_tail_len == max(tails, default=0)
    assert info.max_len == max((length for length, _, _ in drawn), default=0)

    owners = [b for b, (length, _, _) in enumerate(drawn) for _ in range(length)]
    sequence_L = sequence_index(batch.offsets, batch.num_tokens)
    assert sequence_L.tolist() == owners

    # The encoder's result, were each row its token: what is read must be the token asked for.
    tokens_R = [
        int(batch.offsets[b]) + p
        for b, (length, _, _) in enumerate(drawn)
        for p in range(length - tails[b], length)
    ]
    assert tail_index(info).tolist() == tokens_R
    for positions in (batch.ranking_positions, batch.retrieval_positions):
        rows = tail_rows(info, positions, sequence_L[positions])
        assert [tokens_R[row] for row in rows.tolist()] == positions.tolist()


def test_the_rest_of_the_structure_is_the_batch_s():
    batch = make_batch([(3, [1], []), (2, [], [0])])
    info = sequence_info(batch)
    for name in ("offsets", "timestamp", "query_time", "session_start", "num_candidates"):
        assert getattr(info, name) is getattr(batch, name)
    assert info.num_context == batch.num_context
