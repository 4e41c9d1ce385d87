"""`gr inspect` against counts in plain Python over the rows of the log."""

import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings

from gr.cli import main
from gr.inspect_log import inspect
from pipelines.config import DataConfig, StochasticLengthConfig
from pipelines.inspection import expected_tokens, gap_bin, gap_edges, inspect_log
from pipelines.manifest import read_manifest
from pipelines.stream import SessionStream
from pipelines.synthetic.config import PolyaUrnConfig, SyntheticConfig
from pipelines.synthetic.synthesize import synthesize
from tests.pipelines.logs import logs
from tests.pipelines.session_log import session, write_log


def oracle(partitions, histories, offset):
    """Count one row at a time."""
    found = defaultdict(Counter)
    before, ended = Counter(), {}
    for rows in histories or []:
        for row in rows:
            before[row["user_id"]] += len(row["events"])
            found["items"].update(e["item_id"] for e in row["events"])
            found["history"]["events"] += len(row["events"])
    users = Counter(before)
    for rows in partitions:
        for row in rows:
            user, events = row["user_id"], row["events"]
            found["session"][len(events)] += 1
            found["examples"][users[user], len(events)] += 1
            users[user] += len(events)
            found["users"][user] = 1
            found["items"].update(e["item_id"] for e in events)
            found["days"].update((e["timestamp"] + offset) // 86_400 for e in events)
            for one, two in pairwise(events):
                found["event_gaps"][two["timestamp"] - one["timestamp"]] += 1
            if user in ended:
                found["session_gaps"][row["start_ts"] - ended[user]] += 1
            ended[user] = row["end_ts"]
            for event in events:
                for name in ("click", "watch"):
                    value = event[name]
                    if value is not None and value == value:
                        found[name][float(value)] += 1
    found["user"] = Counter(users.values())
    return found


def in_bins(gaps):
    bins = np.zeros(128, np.int64)
    edges = [0, *(2 ** (k / 2) for k in range(127))]
    for gap, count in gaps.items():
        at = max((k for k in range(128) if edges[k] <= gap + 1e-9), default=0)
        bins[at] += count
    return bins.tolist()


@settings(max_examples=15, deadline=None)
@given(drawn=logs(defects=False))
def test_statistics_equal_plain_python(drawn, tmp_path_factory):
    partitions, histories = drawn
    for rows in (*partitions, *(histories or [])):
        for row in rows:
            for event in row["events"]:
                if event["watch"] is not None and event["watch"] != event["watch"]:
                    event["watch"] = None  # sessionize writes no NaN
    folder = tmp_path_factory.mktemp("log")
    write_log(folder, partitions, histories)
    found = inspect_log(read_manifest(folder), day_offset_seconds=3600)
    expected = oracle(partitions, histories, 3600)
    assert found.num_sessions == sum(map(len, partitions))
    assert found.num_events == sum(n * c for n, c in expected["session"].items())
    assert found.num_history_events == expected["history"]["events"]
    assert found.num_users == len(expected["users"])
    assert found.num_items == len(expected["items"])
    assert found.max_item_id == max(expected["items"], default=-1)
    assert found.session_lengths == expected["session"]
    assert found.user_lengths == expected["user"]
    assert found.examples == expected["examples"]
    assert found.events_by_day == expected["days"]
    assert found.event_gaps.tolist() == in_bins(expected["event_gaps"])
    assert found.session_gaps.tolist() == in_bins(expected["session_gaps"])
    for name in ("click", "watch"):
        action, values = found.actions[name], expected[name]
        assert action.known == values.total()
        assert action.positive == sum(c for v, c in values.items() if v > 0)
        assert action.total == pytest.approx(sum(v * c for v, c in values.items()))
        if values:
            assert (action.least, action.most) == (min(values), max(values))


def test_gap_bins_begin_at_their_edges():
    edges = gap_edges()
    gaps = np.array([-5, 0, 1, 2, 3, 4, 59, 60, 86_400, 2**40])
    for gap, at in zip(gaps, gap_bin(gaps), strict=True):
        assert at == 0 or edges[at] <= gap + 1e-9
        assert gap < edges[at + 1]


@pytest.fixture(scope="module")
def urn_log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "log"
    urn = PolyaUrnConfig(
        num_users=60, num_items=20_000, num_timestamps=6, mean_events=20, min_events=5
    )
    synthesize(SyntheticConfig(stream="polya_urn", output=str(folder), partitions=3, polya_urn=urn))
    return folder


@pytest.mark.parametrize("layout", ["interleaved", "merged"])
def test_expected_tokens_are_the_means_of_the_stream(urn_log, layout):
    found = inspect_log(read_manifest(urn_log))
    pairs = np.array(list(found.examples))
    weights = np.array(list(found.examples.values()))

    def stream_mean(seed, **stochastic):
        data = DataConfig(
            log=str(urn_log),
            num_items=20_000,
            layout=layout,
            max_history_tokens=200,
            max_session_events=10_000,
            prefetch=0,
            stochastic_length=StochasticLengthConfig(**stochastic),
        )
        batches = list(SessionStream(data, seed=seed))
        total = sum(batch.num_tokens for batch in batches)
        return total / sum(batch.num_sequences for batch in batches)

    def expected_mean(alpha):
        tokens = expected_tokens(
            pairs[:, 0],
            pairs[:, 1],
            per_event=2 if layout == "interleaved" else 1,
            max_history_tokens=200,
            alpha=alpha,
        )
        return (tokens * weights).sum() / weights.sum()

    assert stream_mean(0) == pytest.approx(expected_mean(0), rel=1e-12)
    drawn = [stream_mean(s, selection="random", alpha=1.7) for s in range(8)]
    spread = np.std(drawn, ddof=1) / len(drawn) ** 0.5
    assert abs(np.mean(drawn) - expected_mean(1.7)) < 5 * spread
    assert expected_mean(1.7) < expected_mean(0) - 10 * spread  # it does drop something


def test_text_plots_and_sequences(tmp_path):
    click, watch = {"click": True, "watch": 2.5}, {"click": None, "watch": 0.0}
    base = 1_650_000_000
    first = session(7, 0, [{"t": base, "item": 3, **click}, {"t": base + 60, "item": 4, **watch}])
    second = session(7, 1, [{"t": base + 9000, "item": 5, **click}])
    write_log(tmp_path / "log", [[first, second]])
    text = inspect(tmp_path / "log", tmp_path / "out", num_sequences=1)
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == [
        "actions.png",
        "inspect.md",
        "lengths.png",
        "times.png",
    ]
    for name in ("actions", "lengths", "times"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
    row = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert re.search(r"\| *3 *\|", row["events"])
    assert re.search(r"\| *66.67% *\| *100.00% *\| *1 *\|", row["click"])
    assert re.search(r"\| *100.00% *\| *66.67% *\| *1.66667 *\| *0 *\| *2.5 *\|", row["watch"])
    tokens = re.findall(r"^(.) (2022\S+ \S+) (ITEM|ACTION) +(.*)$", text, re.M)
    assert tokens == [
        (" ", "2022-04-15 05:20:00", "ITEM", "item_id=3"),
        (" ", "2022-04-15 05:20:00", "ACTION", "click:2 watch:2"),
        (" ", "2022-04-15 05:21:00", "ITEM", "item_id=4"),
        (" ", "2022-04-15 05:21:00", "ACTION", "click:0 watch:1"),
        (">", "2022-04-15 07:50:00", "ITEM", "item_id=5"),
        (">", "2022-04-15 07:50:00", "ACTION", "click:2 watch:2"),
    ]
    assert "![lengths](lengths.png)" in (tmp_path / "out/inspect.md").read_text()


def test_command(urn_log, tmp_path, capsys):
    config = ["--config", "configs/synthetic_urn.yaml", "--output", str(tmp_path / "out")]
    assert main(["inspect", str(urn_log), *config, "--sequences", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("label rating=") > 2
    assert "category=" in out
    assert main(["inspect", str(urn_log)]) == 0
    assert (urn_log.parent / "log_inspect/inspect.md").is_file()
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds no manifest.json of a session-end log" in capsys.readouterr().err
    part = next(urn_log.glob("part-*.parquet"))
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2] + whole[-8:])
    assert main(["inspect", str(urn_log)]) == 2
    assert f"{part} is not a readable Parquet file" in capsys.readouterr().err
    part.write_bytes(whole)
