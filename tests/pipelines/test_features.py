import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import ActionConfig, DataConfig, FeatureConfig, TaskConfig
from pipelines.feature_columns import feature_ids, numbers
from pipelines.features import action_codes, task_labels
from tests.pipelines.logs import MODES, make_config
from tests.pipelines.oracle import action_code, feature_id, task_label

values = st.one_of(
    st.none(), st.sampled_from([math.nan, math.inf, -2.0, 0.5, 1.0, 2.5]), st.floats(-5, 5)
)
bounds = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 2.5]), min_size=1, unique=True).map(
    lambda x: tuple(sorted(x))
)
COMMON = settings(deadline=None, max_examples=60)


@given(column=st.lists(values, max_size=20), thresholds=bounds)
@COMMON
def test_codes_and_bins(column, thresholds):
    array = pa.array(column, pa.float64())
    action, feature = ActionConfig(thresholds=thresholds), FeatureConfig(boundaries=thresholds)
    assert action_codes(numbers(array), action).tolist() == [action_code(v, action) for v in column]
    assert feature_ids(array, feature).tolist() == [feature_id(v, feature) for v in column]


@given(
    column=st.lists(values, max_size=20),
    task=st.builds(
        TaskConfig,
        action=st.just("x"),
        type=st.sampled_from(["binary", "regression"]),
        threshold=st.sampled_from([0.5, 1.0]),
        scale=st.sampled_from([1.0, 4.0]),
        maximum=st.sampled_from([0.0, 1.5]),
        log1p=st.booleans(),
    ),
)
@COMMON
def test_labels(column, task):
    found = task_labels(numbers(pa.array(column, pa.float64())), task)
    expected = [math.nan if (x := task_label(v, task)) is None else x for v in column]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8(), pa.uint32(), pa.int64()])
def test_ids_of_every_integer_type(kind):
    array = pa.array([1, None, 0]).cast(kind)
    assert feature_ids(array, FeatureConfig()).tolist() == [1, -1, 0]
    np.testing.assert_array_equal(numbers(array), [1.0, math.nan, 0.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "merged", "anchor": "event"}, "cannot rank"),
        ({"anchor": "session", "supervise": "all"}, "predicts the session's events only"),
        ({"supervise": "all", "context": "prefix"}, "holds what is known at the session's start"),
        ({"sampled_rate": 2.0}, "data.supervise=sampled only"),
        ({"context": "prefix", "context_features": {}}, "no feature to make tokens of"),
        ({"context": "merged", "context_features": {}}, "no feature to make tokens of"),
        ({"context": "merged", "fill": "tokens", "budget": 9.0}, "cannot know how many tokens"),
        (
            {"context_features": {"creators": FeatureConfig(max_values=2)}},
            r"data.context_features.creators holds several values",
        ),
        ({"item_features": {"x": FeatureConfig(max_values=-1)}}, "x.max_values must be 0"),
        (
            {"item_features": {"x": FeatureConfig(encoding="zscore", boundaries=(1.0,))}},
            "x.encoding=zscore reads one number",
        ),
        (
            {"item_features": {"x": FeatureConfig(encoding="quantile", bins=1)}},
            "x.bins must be at least 2",
        ),
        ({"item_features": {"x": FeatureConfig(bins=3)}}, "read with encoding=quantile only"),
        (
            {
                "item_features": {"x": FeatureConfig(max_values=2)},
                "action_context": ("x",),
            },
            "one value a token",
        ),
        ({"tasks": {}}, "data.tasks is empty"),
        ({"max_session_events": 0}, "data.max_session_events must be at least 1, got 0"),
        ({"max_history_tokens": -1}, "data.max_history_tokens must be at least 0, got -1"),
        ({"num_items": -1}, "data.num_items must be at least 0, got -1"),
        ({"max_reject_fraction": 1.5}, "from 0 to 1, got 1.5"),
        ({"tasks": {"x": TaskConfig(action="click", scale=0.0)}}, "data.tasks.x.scale"),
        (
            {"actions": {"x": ActionConfig(thresholds=(2.0, 1.0))}},
            "data.actions.x.thresholds must be asc",
        ),
        ({"actions": {"x": ActionConfig(thresholds=())}}, "1 to 254 numbers, got 0"),
        (
            {"item_features": {"x": FeatureConfig(boundaries=(1.0, 1.0))}},
            "item_features.x.boundaries",
        ),
        ({"item_features": {"age": FeatureConfig()}}, "must not share names"),
        ({"item_features": {"item_id": FeatureConfig()}}, "must not share names"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(changes, message):
    valid = make_config("log", *MODES[0])
    fields = {name: getattr(valid, name) for name in valid.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        DataConfig(**(fields | changes))
