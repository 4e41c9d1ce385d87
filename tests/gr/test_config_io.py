import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from embeddings.config import TableConfig
from gr.config import TrainConfig
from gr.config_io import ConfigError, load_config
from launch.config import SweepConfig
from pipelines.config import JoinConfig, SessionizeConfig

LOG = "input: events\noutput: ${input}/log\nactions: [click]\n"
RUN = """
run_dir: runs/x
data: {log: log, num_items: 9, num_negatives: 2}
embeddings:
  tables:
    item: {num_embeddings: 10, dim: 8, features: [item_id, target_item_id, negative_item_id]}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_later_layers_win(write):
    write("seed: 1\nlog_every: 1\nmax_steps: 1\nmodel: {dim: 16, num_layers: 1}", "root.yaml")
    (write("", "x").parent / "sub").mkdir()
    write(
        "base: ../root.yaml\nlog_every: 2\nmax_steps: 2\nmodel: {num_layers: 3}", "sub/middle.yaml"
    )
    path = write(f"base: sub/middle.yaml\nmax_steps: 3\n{RUN}")
    config, resolved = load_config(TrainConfig, path, ["max_steps=4", "optim.lr=1e-4"])
    assert (config.seed, config.log_every, config.max_steps) == (1, 2, 4)
    assert (config.model.dim, config.model.num_layers) == (16, 3)
    assert config.optim.lr == 1e-4
    assert config.optim.eps == TrainConfig.__dataclass_fields__["optim"].default_factory().eps
    table = config.embeddings.tables["item"]
    assert isinstance(table, TableConfig)
    assert table.features == ("item_id", "target_item_id", "negative_item_id")
    assert resolved.max_steps == 4


def test_resolved_reads_back_as_the_same_configuration(write):
    config, resolved = load_config(SessionizeConfig, write(LOG), ["joins=[{path: p, key: k}]"])
    assert config.output == resolved.output == "events/log"
    assert config.joins == (JoinConfig(path="p", key="k"),)
    again, _ = load_config(SessionizeConfig, write(OmegaConf.to_yaml(resolved), "again.yaml"))
    assert again == config


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 10**6),
    st.floats(1e-9, 1e3),
    st.text("abc -_:#{}[]'\"", min_size=1, max_size=8),
)
def test_overrides_are_read_as_written(tmp_path_factory, number, lr, text):
    path = tmp_path_factory.mktemp("c") / "c.yaml"
    path.write_text(RUN)
    config, _ = load_config(
        TrainConfig,
        path,
        [f"log_every={number}", f"optim.lr={lr!r}", f"run_dir={json.dumps(text)}"],
    )
    assert (config.log_every, config.optim.lr, config.run_dir) == (number, lr, text)


def test_a_field_called_base_is_no_chain(write):
    config, _ = load_config(SweepConfig, write("base: absent.yaml\noutput: o"))
    assert config.base == "absent.yaml"


@pytest.mark.parametrize(
    ("schema", "text", "overrides", "expected"),
    [
        # Unknown keys, with the nearest valid one.
        (TrainConfig, "modle: {dim: 3}", [], ["config.yaml", "modle", "Did you mean model?"]),
        (TrainConfig, RUN, ["model.dmi=3"], ["override 'model.dmi=3'", "Did you mean model.dim?"]),
        (SessionizeConfig, LOG + "joins: [{pth: p}]", [], ["joins.0.pth", "joins.0.path"]),
        (
            TrainConfig,
            "embeddings: {tables: {a: {dims: 3}}}",
            [],
            ["tables.a.dims", "tables.a.dim?"],
        ),
        # Wrong types.
        (TrainConfig, "model: {dim: 2.5}", [], ["model.dim", "an integer", "2.5 (float)"]),
        (TrainConfig, RUN, ["deterministic=perhaps"], ["true or false", "'perhaps'"]),
        (
            TrainConfig,
            "model: {hstu: {bias: time}}",
            [],
            ["none, position, position_time", "'time'"],
        ),
        (TrainConfig, "eval: {ks: [1, x]}", [], ["eval.ks", "a list, each element an integer"]),
        (TrainConfig, "optim: {betas: [0.9]}", [], ["optim.betas", "a list of 2"]),
        (TrainConfig, "model: 3", [], ["model:", "encoder", "3 (int)"]),
        (TrainConfig, "seed:", [], ["seed", "an integer", "found nothing"]),
        (SessionizeConfig, LOG, ["actions=[a, [b]]"], ["actions", "each element text"]),
        (SessionizeConfig, LOG, ["input.b=1"], ["input:", "text"]),
        (
            SessionizeConfig,
            LOG + "joins: [{path: p, key: k, into: x}]",
            [],
            ["joins.0.into", "event"],
        ),
        (SessionizeConfig, LOG + "counters: {a: {keys: x}}", [], ["counters.a.keys", "a list"]),
        # Missing fields.
        (SessionizeConfig, "input: a", [], ["not set", "actions, output"]),
        (SessionizeConfig, LOG + "joins: [{path: p}]", [], ["not set", "joins[0].key"]),
        # Checks of the dataclasses: which part fails.
        (TrainConfig, RUN, ["embeddings.tables.item.dim=0"], ["embeddings.tables.item: ", "got 0"]),
        (TrainConfig, RUN, ["data.num_negatives=0"], ["data.num_negatives > 0"]),
        (
            TrainConfig,
            RUN,
            ["model.hstu.truncation.layers=1"],
            ["must both be positive", "1 and 0"],
        ),
        (
            TrainConfig,
            RUN,
            ["model.hstu.truncation={layers: 2, history: 9}"],
            ["leaves none of model.num_layers=2"],
        ),
        (
            TrainConfig,
            RUN,
            ["model.hstu.truncation={layers: 1, history: 9}", "data.supervise=all"],
            ["model.hstu.truncation", "data.supervise must be session"],
        ),
        (TrainConfig, RUN, ["model.hstu.semi_local.global_rows=1"], ["window, which is 0"]),
        (
            TrainConfig,
            RUN,
            ["model.hstu.semi_local={window: 9, global_rows: 1}"],
            ["needs data.anchor=session, got event"],
        ),
        # Files and text.
        (SessionizeConfig, "a: [1", [], ["config.yaml", "not valid YAML"]),
        (SessionizeConfig, LOG + "input: b", [], ["duplicate key input"]),
        (SessionizeConfig, "- a", [], ["expected `key: value` lines"]),
        (SessionizeConfig, "words", [], ["expected `key: value` lines"]),
        (SessionizeConfig, LOG + "3: 4", [], ["keys must be text"]),
        (SessionizeConfig, LOG, ["input=${nope}"], ["input", "nope"]),
        (SessionizeConfig, LOG, ["partitions"], ["override 'partitions'", "expected key=value"]),
        (SessionizeConfig, LOG, ["partitions=[1"], ["override", "not valid YAML"]),
        (SessionizeConfig, LOG + "base: config.yaml", [], ["leads back to the file itself"]),
        (SessionizeConfig, LOG + "base: none.yaml", [], ["none.yaml", "named by `base:`"]),
        (SessionizeConfig, LOG + "base: [a]", [], ["base", "the path of one file"]),
    ],
)
def test_bad_input_is_one_message(write, schema, text, overrides, expected):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(schema, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml: no such file"):
        load_config(TrainConfig, tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(TrainConfig, tmp_path)
