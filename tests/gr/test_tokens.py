"""Token embeddings against loops over sequences and tokens, in float64."""

import math
from dataclasses import replace

import pytest
import torch

from embeddings.vocabulary import Vocabulary
from gr.config import EncodingConfig
from gr.model import feature_dims
from gr.tokens import TokenEmbedding, carries_item, places
from pipelines.batch import TokenKind
from tests.gr.batches import (
    DIM,
    batches,
    data_config,
    look_up,
    make_tables,
    random_log,
    random_sessions,
    train_config,
)
from tests.pipelines.logs import MERGED_MODES, MODES, RICH, take_apart


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return random_log(tmp_path_factory.mktemp("log") / "log")


def oracle(sequence, config, module, tables):
    """Return the vector of each token of one sequence."""
    vocabulary = Vocabulary(config.embeddings)
    table_of = {f: name for name, t in config.embeddings.tables.items() for f in t.features}
    data = config.data

    def part(feature, raw, project=module.project):
        name = table_of[feature]
        vector = tables.weights[name][vocabulary.row_of(name, torch.tensor([raw]))[0]].double()
        if feature in project:
            weight = project[feature].weight
            vector = torch.stack([(weight[i] * vector).sum() for i in range(DIM)])
        return vector

    def value_part(name, feature, value):
        """Return the vector of an id, a bag or a number."""
        if feature.is_number:
            number = torch.tensor([math.nan if value is None else value])
            return module.numbers.encode(name, number)[0]
        if not feature.is_bag:
            return part(name, value)
        if not value:
            return torch.zeros(DIM, dtype=torch.float64)
        table = table_of[name]
        ids = vocabulary.row_of(table, torch.tensor(value))
        vectors = tables.weights[table][ids].double()
        scores = torch.zeros(len(value), dtype=torch.float64)
        if config.model.pooling.get(name) == "attention":
            query = module.bags.pooling[name].query_D
            scores = torch.stack([(v * query).sum() for v in vectors]) / math.sqrt(len(query))
        weights = scores.exp() / scores.exp().sum()
        pooled = sum(w * v for w, v in zip(weights, vectors, strict=True))
        return module.project[name](pooled) if name in module.project else pooled

    at = {t: (n, v) for n, values in sequence["context"].items() for t, v in pairs(values, data, n)}
    sizes = [len(action.thresholds) + 2 for action in data.actions.values()]
    item = action = 0
    vectors = []
    for place, kind in enumerate(sequence["kind"]):
        x = torch.zeros(DIM, dtype=torch.float64)
        if kind == TokenKind.CONTEXT:
            name, value = at[place]
            x = x + value_part(name, data.context_features[name], value)
        if kind in (TokenKind.ITEM, TokenKind.EVENT, TokenKind.CANDIDATE):
            x = x + part("item_id", sequence["item_id"][item])
            for name, values in sequence["item_features"].items():
                x = x + value_part(name, data.item_features[name], values[item])
            item += 1
        if kind in (TokenKind.ACTION, TokenKind.EVENT):
            for signal, code in enumerate(sequence["action_codes"][action]):
                x = x + module.action.weight[sum(sizes[:signal]) + code]
            for name in data.action_context:
                x = x + part(name, sequence["item_features"][name][action], module.action_context)
            action += 1
        if kind == TokenKind.CANDIDATE and data.layout == "merged":
            learned = config.model.encoding.candidate_action == "learned"
            x = x + (module.candidate_action if learned else 0.0)
        vectors.append(x)
    assert item == len(sequence["item_id"])
    assert action == len(sequence["action_codes"])
    return vectors


def pairs(values, data, name):
    """Return (token, value) of a context feature."""
    if data.context == "merged":
        return values
    return [(list(data.context_features).index(name), values[0])]


@pytest.mark.parametrize(
    ("candidate_action", "action_context"),
    [
        ("zero", ("price_bin", "tab")),
        ("learned", ()),
        pytest.param("zero", (), marks=pytest.mark.slow),
        pytest.param("learned", ("price_bin", "tab"), marks=pytest.mark.slow),
    ],
    ids=["zero-context", "learned", "zero", "learned-context"],
)
@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_every_token_is_the_sum_of_its_parts(log, mode, candidate_action, action_context):
    encoding = EncodingConfig(position="none", candidate_action=candidate_action)
    data = data_config(log, mode, action_context=action_context)
    config = train_config(data, encoding=encoding)
    tables = make_tables(config)
    torch.manual_seed(1)
    module = TokenEmbedding(config.data, config.model, feature_dims(config)).double()
    expects_learned = candidate_action == "learned" and mode[:2] == ("merged", "session")
    assert (module.candidate_action is not None) == expects_learned
    kinds = set()
    for batch in batches(config.data):
        sequences = take_apart(batch, config.data)
        x_LD = module(batch, look_up(config, tables, batch))
        expected = [x for s in sequences for x in oracle(s, config, module, tables)]
        torch.testing.assert_close(x_LD, torch.stack(expected), rtol=1e-12, atol=1e-12)
        kinds |= set(batch.token_kind.tolist())
    merged, candidates = mode[0] == "merged", mode[1] == "session"
    expected_kinds = {TokenKind.EVENT} if merged else {TokenKind.ITEM, TokenKind.ACTION}
    expected_kinds |= {TokenKind.CANDIDATE} if candidates else set()
    expected_kinds |= {TokenKind.CONTEXT} if mode[3] == "prefix" else set()
    assert kinds == expected_kinds


@pytest.mark.parametrize(
    "mode",
    [
        ("interleaved", "event", "session", "prefix"),
        ("merged", "session", "session", "prefix"),
        *MERGED_MODES,
    ],
    ids="-".join,
)
def test_bags_numbers_and_series(log, mode):
    data = data_config(log, mode, **RICH)
    encoding = EncodingConfig(position="none")
    pooling = {"genres": "attention", "creators": "attention"}
    config = train_config(data, encoding=encoding, pooling=pooling)
    tables = make_tables(config)
    torch.manual_seed(1)
    module = TokenEmbedding(config.data, config.model, feature_dims(config)).double()
    for name in pooling:
        torch.nn.init.normal_(module.bags.pooling[name].query_D)
    num_context = 0
    for batch in batches(config.data):
        sequences = take_apart(batch, config.data)
        batch.ids = batch.lookup_ids()
        x_LD = module(batch, look_up(config, tables, batch))
        expected = [x for s in sequences for x in oracle(s, config, module, tables)]
        torch.testing.assert_close(x_LD, torch.stack(expected), rtol=1e-12, atol=1e-12)
        num_context += int((batch.token_kind == TokenKind.CONTEXT).sum())
        module.observe(batch)
    assert num_context > 20


@pytest.mark.parametrize("features", [{}, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("dim", [DIM, 16], ids=["as_wide", "projected"])
def test_autocast_to_bf16_sums_in_fp32(log, dim, features):
    data = data_config(log, ("interleaved", "event", "session", "prefix"), **features)
    data = replace(data, item_features=features and data.item_features, action_context=())
    config = train_config(data, encoding=EncodingConfig(position="none"), dim=dim)
    tables = make_tables(config)
    module = TokenEmbedding(config.data, config.model, feature_dims(config))
    for batch in batches(config.data):
        batch.ids = batch.lookup_ids()
        rows = {name: x.float() for name, x in look_up(config, tables, batch).items()}
        exact_LD = module(batch, rows)
        with torch.autocast("cpu", torch.bfloat16):
            x_LD = module(batch, rows)
        assert x_LD.dtype == torch.float32
        # Each part is rounded to 8 bits, and so are the factors of a projection.
        torch.testing.assert_close(x_LD, exact_LD, rtol=2**-6, atol=2**-5)


def test_numbers_are_observed_once(log):
    data = data_config(log, ("interleaved", "event", "session", "prefix"), **RICH)
    config = train_config(data)
    module = TokenEmbedding(config.data, config.model, feature_dims(config))
    for batch in batches(config.data):
        module.observe(batch)
    seen, ages, sessions = [], 0, 0
    for rows in random_sessions(0):
        for row in rows:
            seen += [e["seen"] for e in row["events"] if e["seen"] is not None]
            pieces = -(-len(row["events"]) // data.max_session_events)
            ages += pieces * (row["context"]["age"] is not None)
            sessions += 1
    assert 0 < ages < sessions * 2
    count, total, _ = module.numbers.statistics["seen_number"].sums_3F[:, 0].tolist()
    assert count == len(seen)
    assert total == pytest.approx(sum(math.log1p(x) for x in seen))
    assert module.numbers.statistics["age_number"].counts_C.sum() == ages


def test_rows_as_wide_as_the_model_are_not_projected(log):
    config = train_config(data_config(log, ("interleaved", "event", "session", "prefix")))
    module = TokenEmbedding(config.data, config.model, feature_dims(config))
    assert set(module.project) == {"tab", "price_bin", "age", "user", "country"}


def test_items_without_actions(log):
    config = train_config(data_config(log, ("interleaved", "event", "session", "none"), actions={}))
    tables = make_tables(config)
    module = TokenEmbedding(config.data, config.model, feature_dims(config)).double()
    batch = batches(config.data)[-1]
    x_LD = module(batch, look_up(config, tables, batch))
    is_action = batch.token_kind == TokenKind.ACTION
    assert is_action.any()
    assert not x_LD[is_action].any()
    assert x_LD[~is_action].any(1).all()


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_places_are_in_order(where):
    is_there = torch.rand(5000, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = [i for i, x in enumerate(is_there.tolist()) if x]
    assert places(is_there.to(where), len(expected)).tolist() == expected


def test_the_kinds_that_carry_an_item():
    assert carries_item(torch.tensor(list(TokenKind))).tolist() == [
        kind in (TokenKind.ITEM, TokenKind.EVENT, TokenKind.CANDIDATE) for kind in TokenKind
    ]


@pytest.mark.parametrize("names", [("tab", "tab"), ("age",), ("nothing",)])
def test_the_context_of_an_action_is_known(log, names):
    mode = ("interleaved", "event", "session", "none")
    with pytest.raises(ValueError, match="action_context must name features"):
        data_config(log, mode, action_context=names)
