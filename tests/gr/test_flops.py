"""Counts against torch's own counter of matrix products, and against the mask pair by pair."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch.utils.flop_counter import FlopCounterMode

from gr.config import (
    GroupConfig,
    HeadConfig,
    HSTUConfig,
    ModelConfig,
    SemiLocalConfig,
    TransformerConfig,
    TruncationConfig,
)
from gr.flops import (
    layer_flops,
    num_truncated,
    peak_flops,
    sequence_costs,
    training_flops,
    visible_pairs,
)
from gr.hstu import kept_history
from gr.mixture import mixture_groups
from gr.model import ENCODERS
from gr.sequence import sequence_info
from pipelines.config import StochasticLengthConfig
from pipelines.cost import cost_rules
from pipelines.cost import sequence_cost as sequence_cost_of
from tests.gr.batches import batches as batches_of
from tests.gr.batches import data_config, random_log, train_config
from tests.gr.hstu_oracle import make_info, make_sequences, sees, truncated
from tests.pipelines.logs import MODES

MODELS = {
    "hstu": ModelConfig(
        encoder="hstu", dim=12, num_layers=3, hstu=HSTUConfig(num_heads=3, qk_dim=4, v_dim=6)
    ),
    "hstu_concat": ModelConfig(
        encoder="hstu",
        dim=12,
        num_layers=1,
        hstu=HSTUConfig(num_heads=2, qk_dim=8, v_dim=2, concat_ua=True),
    ),
    "semi_local": ModelConfig(
        dim=12,
        num_layers=2,
        hstu=HSTUConfig(
            num_heads=2,
            qk_dim=4,
            v_dim=4,
            semi_local=SemiLocalConfig(window=3, global_rows=2, global_columns=1),
        ),
    ),
    "truncated": ModelConfig(
        dim=12,
        num_layers=4,
        hstu=HSTUConfig(
            num_heads=2,
            qk_dim=4,
            v_dim=4,
            semi_local=SemiLocalConfig(window=2, global_columns=1),
            truncation=TruncationConfig(layers=2, history=5),
        ),
    ),
    "sasrec": ModelConfig(encoder="sasrec", dim=12, num_layers=2),
    "sasrec_wide": ModelConfig(
        encoder="sasrec", dim=12, num_layers=1, transformer=TransformerConfig(ffn_dim=40)
    ),
    "transformer": ModelConfig(encoder="transformer", dim=12, num_layers=2),
    "cross_attention": ModelConfig(encoder="cross_attention", dim=12, num_layers=3),
    "transformer_wide": ModelConfig(
        encoder="transformer", dim=12, num_layers=3, transformer=TransformerConfig(ffn_dim=24)
    ),
}


@st.composite
def batches(draw):
    num_context = draw(st.integers(0, 2))
    lengths, tails, candidates = [], [], []
    for _ in range(draw(st.integers(0, 4))):
        lengths.append(num_context + draw(st.integers(0, 6)))
        tails.append(draw(st.integers(0, lengths[-1])))
        candidates.append(draw(st.integers(0, lengths[-1] - num_context)))
    return make_sequences(lengths, tails, candidates), num_context


SEMI_LOCAL = ("window", "global_rows", "global_columns")


def pairs_by_hand(sequences, num_context, semi_local=None):
    full = tail = 0
    for s in sequences:
        for row in range(s.length):
            keys = sum(bool(sees(row, col, s, num_context, semi_local)) for col in range(s.length))
            full += keys
            tail += keys * (row >= s.length - s.tail)
    return full, tail


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from([None, (1, 0, 0), (2, 1, 0), (1, 0, 2), (3, 2, 1)]))
def test_pairs_are_what_the_mask_shows(batch, numbers):
    sequences, num_context = batch
    semi_local = SemiLocalConfig(**dict(zip(SEMI_LOCAL, numbers or (0, 0, 0), strict=True)))
    found = visible_pairs(make_info(sequences, num_context), semi_local)
    assert found == pairs_by_hand(sequences, num_context, semi_local)


@settings(deadline=None, max_examples=30)
@given(batches(), st.integers(1, 3), st.integers(1, 2))
def test_truncated_layers_cost_what_is_kept(batch, history, layers):
    sequences, num_context = batch
    model = replace(
        MODELS["hstu"],
        hstu=replace(
            MODELS["hstu"].hstu, truncation=TruncationConfig(layers=layers, history=history)
        ),
    )
    info = make_info(sequences, num_context, keep_history=history)
    kept = [truncated(s, num_context, history) for s in sequences]
    per_key, per_query, per_pair = layer_flops(model)
    expected, number = 0, model.num_layers - layers
    for structure, count in ((sequences, number), (kept, layers - 1)):
        tokens = sum(s.length for s in structure)
        full = pairs_by_hand(structure, num_context)[0]
        expected += count * (tokens * (per_key + per_query) + full * per_pair)
    tail_pairs = pairs_by_hand(kept, num_context)[1]
    expected += sum(s.length for s in kept) * per_key + tail_pairs * per_pair
    expected += sum(s.tail for s in kept) * per_query
    assert training_flops(model, info) == 3 * expected


def count_matrix_products(model, info):
    """Return torch's count of mm and addmm, forward and backward; attention's are batched ones."""
    encoder = ENCODERS[model.encoder](model)
    x_LD = torch.randn(int(info.offsets[-1]), model.dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        encoder(x_LD, info).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("name", MODELS)
def test_projections_and_feed_forward_as_torch_counts_them(name):
    model = MODELS[name]
    sequences = make_sequences([7, 3, 9], [2, 3, 1], [0, 1, 1])
    history, layers = kept_history(model), num_truncated(model)
    info = make_info(sequences, num_context=1, keep_history=history)
    alone = ModelConfig(
        encoder=model.encoder,
        dim=model.dim,
        num_layers=model.num_layers,
        hstu=model.hstu,
        transformer=model.transformer,
    )
    semi_local = model.hstu.semi_local if model.encoder == "hstu" else None
    full, tail = pairs_by_hand(sequences, 1, semi_local)
    pairs = (model.num_layers - max(layers, 1)) * full
    if layers:
        kept, tail = pairs_by_hand([truncated(s, 1, history) for s in sequences], 1, semi_local)
        pairs += (layers - 1) * kept
    pairs += tail
    if name == "cross_attention":
        pairs = model.num_layers * tail
    # Scores and weighted values: K and V multiply-adds a head and pair, three times in training.
    if model.encoder == "hstu":
        width = model.hstu.num_heads * (model.hstu.qk_dim + model.hstu.v_dim)
    else:
        width = 2 * model.dim
    attention = 3 * 2 * width * pairs
    assert training_flops(alone, info) == count_matrix_products(model, info) + attention


def test_nothing_costs_nothing():
    model = MODELS["hstu"]
    assert training_flops(model, make_info([])) == 0
    dlrm = ModelConfig(encoder="dlrm", head=HeadConfig(retrieval=False))
    assert training_flops(dlrm, make_info(make_sequences([4], [1]))) == 0


def test_only_a_known_device_has_a_peak(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "Other": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak


MIXED = {
    "mixture": replace(MODELS["hstu"], mixture={"a": GroupConfig(history=3), "b": GroupConfig()}),
    "mixture_truncated": replace(
        MODELS["truncated"], mixture={"a": GroupConfig(history=4), "b": GroupConfig(history=1)}
    ),
}


@pytest.mark.parametrize("mode", MODES, ids="-".join)
# Compiling the sum over two stacks takes seconds.
@pytest.mark.parametrize(
    "name", [*MODELS, *(pytest.param(n, marks=pytest.mark.slow) for n in MIXED)]
)
def test_the_data_side_counts_what_the_encoder_does(tmp_path_factory, mode, name):
    log = random_log(tmp_path_factory.mktemp("log") / "log")
    data = data_config(log, mode, positive=())
    model = fitting((MODELS | MIXED)[name], mode)
    groups = mixture_groups(model, data)
    rules = cost_rules(data, sequence_costs(model))
    counted = expected = 0.0
    for batch in batches_of(data):
        info = sequence_info(batch, keep_history=kept_history(model), groups=groups)
        expected += training_flops(model, info)
        session = batch.lengths - batch.session_start
        history = batch.session_start - batch.num_context
        for n, m in zip(history.tolist(), session.tolist(), strict=True):
            per_event = rules.tokens
            counted += cost_of(
                n // per_event.per_history_event, m // per_event.per_session_event, rules
            )
    if mode[:2] == ("merged", "event"):  # a single event without history is read nowhere
        assert expected <= counted < 1.03 * expected
    else:
        assert counted == pytest.approx(expected, rel=1e-12)


def fitting(model, mode):
    """Return the model without what its configuration refuses in a mode."""
    hstu = model.hstu
    if mode[1] == "event":
        hstu = replace(hstu, semi_local=replace(hstu.semi_local, global_rows=0))
    if mode[2] != "session":
        hstu = replace(hstu, truncation=TruncationConfig())
        model = replace(model, mixture={})
    return replace(model, hstu=hstu)


@pytest.mark.slow
def test_a_group_that_is_chosen_by_actions_costs_at_most_what_is_planned(tmp_path_factory):
    data = data_config(random_log(tmp_path_factory.mktemp("log") / "log"), MODES[3], positive=())
    mixture = {"a": GroupConfig(history=3), "b": GroupConfig(actions={"click": 0.5})}
    model = replace(MODELS["hstu"], mixture=mixture)
    rules, groups = cost_rules(data, sequence_costs(model)), mixture_groups(model, data)
    planned = spent = 0.0
    for batch in batches_of(data):
        spent += training_flops(model, sequence_info(batch, groups=groups))
        session = (batch.lengths - batch.session_start) // rules.tokens.per_session_event
        history = (batch.session_start - batch.num_context) // rules.tokens.per_history_event
        for n, m in zip(history.tolist(), session.tolist(), strict=True):
            planned += cost_of(n, m, rules)
    assert 0.3 * planned < spent < planned


@njit
def cost_of(n, m, rules):
    return sequence_cost_of(n, m, rules)


@pytest.mark.parametrize(
    "changes",
    [
        {"fill": "flops", "budget": 1.0, "sessions_per_partition": 8},
        {"stochastic_length": StochasticLengthConfig(selection="greedy", balance=True)},
    ],
)
def test_a_model_without_sequences_has_no_cost_to_balance(changes):
    data = data_config("none", ("interleaved", "event", "session", "none"), **changes)
    with pytest.raises(ValueError, match="encoder=dlrm reads no sequence"):
        train_config(data, encoder="dlrm", head=HeadConfig(retrieval=False))
