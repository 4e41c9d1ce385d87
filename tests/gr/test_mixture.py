"""Mixture of transducers: what each stack reads, against plain Python, and what the heads get."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from gr.config import GroupConfig, ModelConfig, SemiLocalConfig, TruncationConfig
from gr.flops import layer_flops, training_flops
from gr.hstu import kept_history
from gr.mixture import mixture_groups
from gr.model import dense_model, feature_dims
from gr.sequence import sequence_info
from pipelines.batch import TokenKind
from tests.gr.batches import batches, data_config, look_up, make_tables, random_log, train_config
from tests.gr.hstu_oracle import Sequence, make_info, truncated
from tests.gr.test_flops import pairs_by_hand
from tests.gr.test_model import SMALL, leaks
from tests.pipelines.logs import MERGED_MODES, MODES

MIXTURE = {
    "newest": GroupConfig(history=2),
    "engaged": GroupConfig(actions={"click": 0.5, "watch": 3.0}),
    "watched": GroupConfig(actions={"watch": 1.0}, history=1),
}
SESSION_MODES = [mode for mode in [*MODES, *MERGED_MODES] if mode[2] == "session"]


def kept_by_hand(data, batch, info, group):
    """Return the tokens of each sequence that a stack reads, as indices within it."""
    kinds, codes = batch.token_kind.tolist(), iter(batch.action_codes.tolist())
    of_token = {i: next(codes) for i, kind in enumerate(kinds) if kind in (2, 3)}
    columns, chosen = list(data.actions), []
    ends = batch.offsets.tolist()
    for b, (first, end) in enumerate(pairwise(ends)):
        session = first + int(batch.session_start[b])
        tail = end - int(info.tail_offsets[b + 1] - info.tail_offsets[b])
        kept = {i for i in range(first, end) if i >= min(session, tail) or kinds[i] == 0}
        count = 0
        for i in reversed(range(first, session)):
            if i not in of_token:
                continue
            values = {name: of_token[i][c] for c, name in enumerate(columns)}
            reaches = [
                # The code of a value counts the thresholds that it reaches, and one more.
                values[name] - 1 > data.actions[name].thresholds.index(least)
                for name, least in group.actions.items()
            ]
            if (any(reaches) or not group.actions) and (count < group.history or not group.history):
                count += 1
                kept |= {i} if kinds[i] == TokenKind.EVENT else {i - 1, i}
        chosen.append([i - first for i in sorted(kept)])
    return chosen


def a_log(tmp_path_factory):
    return random_log(tmp_path_factory.mktemp("log") / "log", seed=1)


@pytest.mark.parametrize("mode", SESSION_MODES, ids="-".join)
def test_a_stack_reads_context_session_and_its_own_events(tmp_path_factory, mode):
    data = data_config(a_log(tmp_path_factory), mode)
    config = train_config(data, mixture=MIXTURE)
    groups = mixture_groups(config.model, data)
    num_dropped = 0
    for batch in batches(data):
        whole = sequence_info(batch)
        info = sequence_info(batch, groups=groups)
        for found, group in zip(info.groups, MIXTURE.values(), strict=True):
            chosen = kept_by_hand(data, batch, whole, group)
            starts = batch.offsets[:-1].tolist()
            tokens = [s + i for s, own in zip(starts, chosen, strict=True) for i in own]
            assert found.tokens.tolist() == tokens
            own = found.info
            assert own.offsets.diff().tolist() == [len(x) for x in chosen]
            assert own.max_len == max((len(x) for x in chosen), default=0)
            assert torch.equal(own.timestamp, batch.timestamp[tokens])
            assert torch.equal(own.query_time, batch.query_time[tokens])
            before = [
                sum(i < start for i in x)
                for x, start in zip(chosen, batch.session_start.tolist(), strict=True)
            ]
            assert own.session_start.tolist() == before
            assert torch.equal(own.tail_offsets, whole.tail_offsets)
            num_dropped += batch.num_tokens - len(tokens)
    assert num_dropped > 0


@pytest.mark.parametrize("mode", [MODES[0], MODES[3], MODES[7]], ids="-".join)
@pytest.mark.parametrize("encoder", ["hstu", "transformer"])
def test_heads_read_the_rows_of_all_stacks(tmp_path_factory, mode, encoder):
    """Each stack, given the tokens of one sequence that were chosen by hand, makes its rows."""
    data = data_config(a_log(tmp_path_factory), mode)
    config = train_config(data, encoder=encoder, mixture=MIXTURE)
    groups = mixture_groups(config.model, data)
    torch.manual_seed(1)
    model = dense_model(config, feature_dims(config), 0).double()
    tables = make_tables(config)
    read = []
    model.encoder.register_forward_hook(lambda _, inputs, output: read.append((inputs, output)))
    for batch in batches(data):
        rows = look_up(config, tables, batch)
        out = model(batch, sequence_info(batch, groups=groups), rows)
        assert all(value.isfinite().all() for value in out.ranking.values())
        (x_LD, info), y = read.pop()
        parts = []
        for stack, group in zip(model.encoder.stacks.values(), MIXTURE.values(), strict=True):
            made = []
            chosen = kept_by_hand(data, batch, info, group)
            for b, own in enumerate(chosen):
                tokens = batch.offsets[b] + torch.tensor(own, dtype=torch.int64)
                start = sum(i < batch.session_start[b] for i in own)
                alone = Sequence(
                    len(own),
                    int(info.tail_offsets[b + 1] - info.tail_offsets[b]),
                    int(batch.num_candidates[b]),
                    int(start),
                    batch.timestamp[tokens].tolist(),
                    batch.query_time[tokens].tolist(),
                )
                made.append(stack(x_LD[tokens], make_info([alone], batch.num_context)))
            parts.append(torch.cat(made))
        torch.testing.assert_close(y, torch.cat(parts, 1), rtol=1e-10, atol=1e-12)
        assert y.shape == (info.num_rows, 3 * config.model.dim)


@pytest.mark.parametrize("mode", [MODES[0], MODES[7]], ids="-".join)
def test_no_prediction_knows_what_comes(tmp_path, mode):
    leaking, showing = leaks(tmp_path, mode, mixture=MIXTURE)
    assert leaking == set()
    assert {change[2] for change, _ in showing} >= {"item", "action"}


def test_flops_are_those_of_the_stacks(tmp_path_factory):
    data = data_config(a_log(tmp_path_factory), MODES[7])
    hstu = replace(
        SMALL,
        semi_local=SemiLocalConfig(window=2, global_rows=1),
        truncation=TruncationConfig(layers=1, history=2),
    )
    model = train_config(data, mixture=MIXTURE, hstu=hstu, num_layers=3).model
    per_key, per_query, per_pair = layer_flops(model)
    groups = mixture_groups(model, data)
    for batch in batches(data):
        info = sequence_info(batch, keep_history=kept_history(model), groups=groups)
        expected = 0
        for group in MIXTURE.values():
            whole = [
                Sequence(
                    len(own),
                    int(info.tail_offsets[b + 1] - info.tail_offsets[b]),
                    int(batch.num_candidates[b]),
                    sum(i < int(batch.session_start[b]) for i in own),
                    [0] * len(own),
                    [0] * len(own),
                )
                for b, own in enumerate(kept_by_hand(data, batch, info, group))
            ]
            kept = [truncated(s, batch.num_context, 2) for s in whole]
            full = pairs_by_hand(whole, batch.num_context, hstu.semi_local)[0]
            tail = pairs_by_hand(kept, batch.num_context, hstu.semi_local)[1]
            tokens, rest = (sum(s.length for s in x) for x in (whole, kept))
            expected += 2 * (tokens * (per_key + per_query) + full * per_pair)
            expected += rest * per_key + info.num_rows * per_query + tail * per_pair
        assert training_flops(model, info) == 3 * expected


@pytest.mark.parametrize(
    ("mixture", "changes", "message"),
    [
        ({"one": GroupConfig()}, {}, "two groups or more"),
        ({"a": GroupConfig(), "b": GroupConfig(actions={"like": 1})}, {}, "data.actions lacks"),
        (
            {"a": GroupConfig(), "b": GroupConfig(actions={"watch": 2.0})},
            {},
            r"watch=2.0 is not one of .*\[1.0, 3.0\]",
        ),
        (MIXTURE, {"supervise": "all"}, "model.mixture"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(mixture, changes, message):
    data = replace(data_config("none", MODES[0]), **changes)
    encoding = {"encoding": replace(ModelConfig().encoding, position="from_start")}
    with pytest.raises(ValueError, match=message):
        train_config(data, mixture=mixture, **encoding)
    with pytest.raises(ValueError, match="at least 0"):
        GroupConfig(history=-1)
