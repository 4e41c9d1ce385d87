"""Token embeddings against loops over sequences and tokens, in float64."""

import pytest
import torch

from embeddings.vocabulary import Vocabulary
from gr.config import EncodingConfig
from gr.model import feature_dims
from gr.tokens import TokenEmbedding, carries_item
from pipelines.batch import TokenKind
from tests.gr.batches import (
    DIM,
    batches,
    data_config,
    look_up,
    make_tables,
    random_log,
    train_config,
)
from tests.pipelines.logs import MODES, take_apart


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

    sizes = [len(action.thresholds) + 2 for action in data.actions.values()]
    item = action = 0
    vectors = []
    for place, kind in enumerate(sequence["kind"]):
        x = torch.zeros(DIM, dtype=torch.float64)
        if kind == TokenKind.CONTEXT:
            x = x + part(list(data.context_features)[place], sequence["context"][place])
        if kind in (TokenKind.ITEM, TokenKind.EVENT, TokenKind.CANDIDATE):
            x = x + part("item_id", sequence["item_id"][item])
            for name, values in sequence["item_features"].items():
                x = x + part(name, values[item])
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


@pytest.mark.parametrize("action_context", [(), ("price_bin", "tab")], ids=["", "context"])
@pytest.mark.parametrize("candidate_action", ["zero", "learned"])
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


def test_the_kinds_that_carry_an_item():
    assert carries_item(torch.tensor(list(TokenKind))).tolist() == [
        kind in (TokenKind.ITEM, TokenKind.EVENT, TokenKind.CANDIDATE) for kind in TokenKind
    ]


@pytest.mark.parametrize("names", [("tab", "tab"), ("age",), ("nothing",)])
def test_the_context_of_an_action_is_known(log, names):
    mode = ("interleaved", "event", "session", "none")
    with pytest.raises(ValueError, match="action_context must name features"):
        data_config(log, mode, action_context=names)
