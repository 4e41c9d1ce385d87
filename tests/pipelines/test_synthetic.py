"""The synthetic streams against their definitions, in plain Python over the written log."""

import hashlib
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from gr.config_io import load_config
from pipelines.config import DataConfig, SessionizeConfig, TaskConfig
from pipelines.manifest import read_manifest, verify_checksums
from pipelines.sessionize import sessionize
from pipelines.stream import SessionStream
from pipelines.synthetic.config import DirichletConfig, PolyaUrnConfig, SyntheticConfig
from pipelines.synthetic.dirichlet import DirichletStream
from pipelines.synthetic.synthesize import make_stream, synthesize

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("synthetic")

START = 1_640_995_200
DIRICHLET = DirichletConfig(
    num_items=600,
    num_categories=20,
    num_records=3000,
    length=40,
    alpha=(1.0, 30.0),
    seconds_per_record=7,
)
URN = PolyaUrnConfig(
    num_users=700,
    num_items=60_000,
    num_categories=12,
    num_timestamps=8,
    mean_events=40,
    min_events=33,
    alpha=(1, 60),
    seconds_per_timestamp=3600,
)


def configured(folder, stream, **changes):
    part = {"dirichlet": DIRICHLET} if stream == "dirichlet" else {"polya_urn": URN}
    fields = {"stream": stream, "output": str(folder), "partitions": 3, "seed": 5, "threads": 1}
    return SyntheticConfig(**(fields | part | changes))


def read_rows(folder, files):
    return [row for file in files for row in pq.read_table(folder / file.name).to_pylist()]


@pytest.fixture(scope="module")
def dirichlet(tmp_path_factory):
    config = configured(tmp_path_factory.mktemp("synthetic") / "dirichlet", "dirichlet")
    assert synthesize(config) == 3000 * 40
    manifest = read_manifest(config.output)
    verify_checksums(manifest)
    rows = read_rows(manifest.folder, manifest.parts)
    return config, manifest, {row["user_id"]: row for row in rows}


@pytest.fixture(scope="module")
def urn(tmp_path_factory):
    config = configured(tmp_path_factory.mktemp("synthetic") / "urn", "polya_urn")
    synthesize(config)
    manifest = read_manifest(config.output)
    sessions = {}
    for files in (manifest.histories, manifest.parts):
        for row in read_rows(manifest.folder, files):
            sessions[row["user_id"], row["session_id"]] = row
    return config, manifest, sessions


def z_of(observed, expected, variance):
    """Return how many deviations a sum of independent (or martingale) terms lies from its mean."""
    return (observed - expected) / math.sqrt(variance)


def items_by_category(rows):
    found = {}
    for row in rows:
        for event in row["events"]:
            assert found.setdefault(event["item_id"], event["category"]) == event["category"]
    return found


def test_dirichlet_records_times_and_categories_of_items(dirichlet):
    _, manifest, rows = dirichlet
    assert sorted(rows) == list(range(3000))
    for record, row in rows.items():
        times = [event["timestamp"] for event in row["events"]]
        assert times == [START + 7 * record + n for n in range(40)]
        assert (row["session_id"], row["start_ts"], row["end_ts"]) == (0, times[0], times[-1])
    assert not manifest.histories
    of_item = items_by_category(rows.values())
    assert set(range(590)) <= set(of_item) <= set(range(599))  # 599.88 ids are open at the end
    counts = Counter(of_item.values())
    assert stats.chisquare([counts[c] for c in range(20)]).pvalue > 1e-4


def test_dirichlet_vocabulary_opens_as_defined_and_items_are_uniform(dirichlet):
    _, _, rows = dirichlet
    of_item = items_by_category(rows.values())
    ranks, newest = [], 0
    for record, row in rows.items():
        bound = int((0.4 + 0.6 * record / 3000) * 600)
        for event in row["events"]:
            assert event["item_id"] < bound
            opened = [i for i in range(bound) if of_item[i] == event["category"]]
            ranks.append((opened.index(event["item_id"]) + 0.5) / len(opened))
            newest += event["item_id"] == bound - 1
        if record > 400:
            break
    assert newest > 0  # the bound itself is reached
    assert stats.kstest(ranks, "uniform").pvalue > 1e-4


def test_dirichlet_categories_follow_the_urn(dirichlet):
    config, _, rows = dirichlet
    stream, _, _ = make_stream(config)
    early, late, after = np.zeros(3), np.zeros(3), np.zeros(3)
    for record, row in rows.items():
        categories, prior, alpha = stream.parameters(record)
        counts = dict.fromkeys(categories.tolist(), 0)
        h = dict(zip(categories.tolist(), prior.tolist(), strict=True))
        last = None
        for n, event in enumerate(row["events"], start=1):
            # Of the first category drawn: is it this event's, and how probable was that?
            c = categories[0]
            p = (alpha * h[c] + counts[c]) / (alpha + n - 1)
            # Weighted by what is known before the event: an urn that reinforces too much or too
            # little is right on average, and wrong where the counts differ from the prior.
            w = counts[c] / (n - 1) - h[c] if n > 1 else 0
            into = early if n <= 8 else late
            into += (w * (event["category"] == c), w * p, w * w * p * (1 - p))
            # The order of the events before does not matter, the last one included.
            w = (last == c) - p if n > 1 else 0
            after += (w * (event["category"] == c), w * p, w * w * p * (1 - p))
            last = event["category"]
            counts[event["category"]] += 1  # a category beyond the record's is a KeyError
    for sums in (early, late, after):
        assert abs(z_of(*sums)) < 4


def test_dirichlet_items_come_back_as_often_as_defined():
    config = replace(DIRICHLET, repeat="item", num_records=300)
    stream = DirichletStream(config, seed=5, start_ts=0)
    sums = {place: np.zeros(3) for place in (0, 1, 6)}
    for record in range(300):
        categories, prior, alpha = stream.parameters(record)
        (made,) = stream.sessions([np.array([record])], 10**6)
        item, category = made.item_id, made.columns["category"]
        for place, into in sums.items():
            of_category = stream.items[stream.offsets[category[place]] :][
                : np.diff(stream.offsets)[category[place]]
            ]
            opened = np.sum(of_category < stream.num_open(record))
            h = prior[categories == category[place]].sum()
            n = np.arange(place + 1, 40)
            count = np.cumsum(item == item[place])[n - 1]
            p = (count + alpha * h / opened) / (alpha + n)
            into += (np.sum(item[n] == item[place]), p.sum(), np.sum(p * (1 - p)))
    assert all(abs(z_of(*each)) < 4 for each in sums.values())


def test_a_dirichlet_log_can_be_what_follows_on_another():
    config = replace(DIRICHLET, initial_fraction=1.0, num_records=30)
    (whole,) = DirichletStream(config, seed=5, start_ts=7).sessions([np.arange(30)], 10**6)
    config = replace(config, first_record=20, num_records=10)
    stream = DirichletStream(config, seed=5, start_ts=7)
    (later,) = stream.sessions([np.arange(10)], 10**6)
    for name in ("item_id", "timestamp"):
        np.testing.assert_array_equal(getattr(later, name), getattr(whole, name)[20 * 40 :])
    np.testing.assert_array_equal(later.user_id, np.arange(10))
    categories, _, _ = stream.parameters(3)
    assert set(later.columns["category"][3 * 40 : 4 * 40]) <= set(categories.tolist())


def test_dirichlet_parameters_are_drawn_as_defined(dirichlet):
    config, _, _ = dirichlet
    stream, _, _ = make_stream(config)
    drawn = [stream.parameters(record) for record in range(3000)]
    sizes = Counter(len(categories) for categories, _, _ in drawn)
    assert stats.chisquare([sizes[k] for k in (1, 2, 3, 4, 5)]).pvalue > 1e-4
    assert sum(sizes.values()) == 3000
    assert all(len(set(c.tolist())) == len(c) for c, _, _ in drawn)
    assert all(abs(sum(h) - 1) < 1e-12 for _, h, _ in drawn)
    used = Counter(c for categories, _, _ in drawn for c in categories.tolist())
    assert stats.chisquare([used[c] for c in range(20)]).pvalue > 1e-4
    alphas = [(alpha - 1) / 29 for _, _, alpha in drawn]
    assert stats.kstest(alphas, "uniform").pvalue > 1e-4
    # Uniform on the simplex of k categories: each share is Beta(1, k - 1).
    for k in (2, 5):
        shares = [h[k - 1] for _, h, _ in drawn if len(h) == k]
        assert stats.kstest(shares, stats.beta(1, k - 1).cdf).pvalue > 1e-4


def test_urn_users_sessions_and_times(urn):
    _, manifest, sessions = urn
    assert {user for user, t in sessions if t == -1} == set(range(700))
    active = [t for _, t in sessions if t >= 0]
    assert set(active) == set(range(8))
    assert abs(z_of(len(active), 700 * 8 * 0.7, 700 * 8 * 0.21)) < 4
    spread = []
    for (_, t), row in sessions.items():
        times = [event["timestamp"] for event in row["events"]]
        begin = START + t * 3600
        assert times == list(range(times[0], times[0] + len(times)))
        assert begin <= times[0]
        assert times[-1] < begin + 3600
        spread.append((times[0] - begin + 0.5) / (3600 - len(times) + 1))
    assert stats.kstest(spread, "uniform").pvalue > 1e-4
    assert manifest.num_history_events == sum(
        len(row["events"]) for (_, t), row in sessions.items() if t < 0
    )


def test_urn_lengths_are_rounded_normal_with_a_floor(urn):
    _, _, sessions = urn
    lengths = Counter(len(row["events"]) for row in sessions.values())
    normal = stats.norm(40, 10)
    expected = {n: normal.cdf(n + 0.5) - normal.cdf(n - 0.5) for n in range(34, 60)}
    expected[33] = normal.cdf(33.5)  # the floor takes what is below
    expected["more"] = 1 - normal.cdf(59.5)
    observed = {n: lengths[n] for n in range(33, 60)}
    observed["more"] = sum(count for n, count in lengths.items() if n >= 60)
    total = sum(lengths.values())
    assert sum(observed.values()) == total
    names = list(expected)
    chi = stats.chisquare([observed[n] for n in names], [expected[n] * total for n in names])
    assert chi.pvalue > 1e-4


def test_urn_categories_follow_the_urn_of_the_events_before_the_session(urn):
    config, _, sessions = urn
    stream, _, _ = make_stream(config)
    base, later = np.zeros(3), np.zeros(3)
    alphas, used = [], Counter()
    for user in range(700):
        categories = stream.categories(user).tolist()
        assert len(set(categories)) == 4
        used.update(categories)
        counts = dict.fromkeys(categories, 0)
        for t in range(-1, 8):
            row = sessions.get((user, t))
            if row is None:
                continue
            alpha = stream.alpha(user, t)
            alphas.append(alpha)
            c = categories[2]
            p = (alpha / 4 + counts[c]) / (alpha + sum(counts.values()))
            events = [event["category"] for event in row["events"]]
            # Weighted by what is known before the session, as above.
            w = 1 if t < 0 else p - 1 / 4
            into = base if t < 0 else later
            into += (w * events.count(c), len(events) * w * p, len(events) * w * w * p * (1 - p))
            for category in events:
                counts[category] += 1
    assert abs(z_of(*base)) < 4
    assert abs(z_of(*later)) < 4
    assert stats.chisquare([used[c] for c in range(12)]).pvalue > 1e-4
    drawn = Counter(alphas)
    assert set(drawn) <= set(range(1, 61))
    assert stats.chisquare([drawn[a] for a in range(1, 61)]).pvalue > 1e-4


def test_urn_vocabulary_grows_with_time(urn):
    _, _, sessions = urn
    places = {t: [] for t in range(-1, 8)}
    for (_, t), row in sessions.items():
        for event in row["events"]:
            category, index = divmod(event["item_id"], 5000)
            assert category == event["category"]
            places[t].append(index)
    for t, indices in places.items():
        opened = int(5000 * max(t + 1, 1) / 8)
        assert max(indices) < opened
        assert stats.kstest((np.array(indices) + 0.5) / opened, "uniform").pvalue > 1e-4


def test_urn_ratings(urn):
    config, _, sessions = urn
    stream, _, _ = make_stream(config)
    own = {}
    shares = Counter()
    events_at = Counter()
    for (user, t), row in sessions.items():
        categories = stream.categories(user).tolist()
        one, two, three = (math.cos((t + s) * math.pi / 4) / 2 for s in (0, 2, 4))
        levels = [
            {4.5 + one: 0.8, 4.0 + two: 0.2},
            {4.5 + one: 0.1, 4.0 + two: 0.8, 3.5 + three: 0.1},
            {3.5 + one: 0.1, 3.0 + two: 0.8, 2.5 + three: 0.1},
            {2.5 + one: 0.1, 2.0 + two: 0.8, 1.5 + three: 0.1},
        ]
        for event in row["events"]:
            place = categories.index(event["category"])
            possible = {
                (level, star)
                for level in levels[place]
                for star in (1.0, 2.0, 3.0, 4.0, 5.0)
                if abs((level + star) / 2 - event["rating"]) < 1e-9
            }
            assert possible
            if len(possible) == 1:
                ((_, star),) = possible
                assert own.setdefault(event["item_id"], star) == star
        # At t = 1 the levels of a place are a quarter apart or more, so each rating has one reading
        # once the item's own is known.
    stars = Counter(own.values())
    assert stars.total() > 2000
    for (user, t), row in sessions.items():
        if t != 1:
            continue
        categories = stream.categories(user).tolist()
        for event in row["events"]:
            star = own.get(event["item_id"])
            if star is None or categories.index(event["category"]) != 1:
                continue
            level = event["rating"] * 2 - star
            shares[round(level, 6)] += 1
            events_at[t] += 1
    # t = 1: cos(pi/4) / 2, cos(3 pi/4) / 2, cos(5 pi/4) / 2 around 4.5, 4.0, 3.5.
    half = math.sqrt(0.5) / 2
    expected = {round(4.5 + half, 6): 0.1, round(4.0 - half, 6): 0.8, round(3.5 - half, 6): 0.1}
    assert set(shares) == set(expected)
    total = sum(shares.values())
    chi = stats.chisquare([shares[x] for x in expected], [expected[x] * total for x in expected])
    assert chi.pvalue > 1e-4


def test_urn_item_ratings_have_the_published_shares():
    from pipelines.synthetic.polya_urn import _item_rating, njit

    @njit
    def rate(items):
        out = np.empty(len(items))
        for i in range(len(items)):
            out[i] = _item_rating(3, items[i])
        return out

    counts = Counter(rate(np.arange(100_000)).tolist())
    share = {5.0: 0.2, 4.0: 0.25, 3.0: 0.25, 2.0: 0.2, 1.0: 0.1}
    chi = stats.chisquare([counts[s] for s in share], [1e5 * share[s] for s in share])
    assert chi.pvalue > 1e-4


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.*"))
    }


@pytest.mark.parametrize("stream", ["dirichlet", "polya_urn"])
@pytest.mark.parametrize("format", ["sessions", "events"])
def test_same_seed_same_bytes_by_any_chunk_and_threads(stream, format, tmp_path):
    part = (
        {"dirichlet": DirichletConfig(num_items=600, num_categories=20, num_records=200, length=9)}
        if stream == "dirichlet"
        else {"polya_urn": PolyaUrnConfig(num_users=40, num_items=60_000, num_timestamps=4)}
    )
    first = configured(tmp_path / "a", stream, format=format, **part)
    changed = {"chunk_events": 1, "threads": 3}
    second = configured(tmp_path / "b", stream, format=format, **part, **changed)
    other = configured(tmp_path / "c", stream, format=format, seed=6, **part)
    for config in (first, second, other):
        synthesize(config)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    for name, value in digest(tmp_path / "c").items():
        assert digest(tmp_path / "a")[name] != value


def test_a_user_does_not_depend_on_the_partitions(tmp_path, urn):
    _, _, sessions = urn
    config = configured(tmp_path / "one", "polya_urn", partitions=1)
    synthesize(config)
    manifest = read_manifest(config.output)
    rows = read_rows(manifest.folder, (*manifest.histories, *manifest.parts))
    assert {(row["user_id"], row["session_id"]): row for row in rows} == sessions


def test_event_log_and_session_log_hold_the_same(tmp_path, urn):
    _, _, sessions = urn
    synthesize(configured(tmp_path / "events", "polya_urn", format="events"))
    log = SessionizeConfig(
        input=str(tmp_path / "events/events"),
        history=str(tmp_path / "events/history"),
        output=str(tmp_path / "log"),
        actions=("rating",),
        features=("category",),
        partitions=2,
        gap_seconds=1,
        threads=1,
        duplicates="keep",
    )
    manifest = sessionize(log)
    found = {}
    for row in read_rows(manifest.folder, (*manifest.histories, *manifest.parts)):
        found.setdefault(row["user_id"], []).extend(row["events"])
    for user in range(700):
        made = [
            e for t in range(-1, 8) if (user, t) in sessions for e in sessions[user, t]["events"]
        ]
        assert sorted(found[user], key=lambda e: e["timestamp"]) == made


def test_the_stream_reads_it(urn):
    config, manifest, _ = urn
    data = DataConfig(
        log=config.output,
        num_items=60_000,
        window="hour",
        tasks={"rating": TaskConfig(action="rating", threshold=3.5)},
        prefetch=0,
    )
    batches = list(SessionStream(data, seed=0))
    assert sum(batch.num_sequences for batch in batches) == manifest.num_sessions
    ranked = sum(len(batch.ranking_positions) for batch in batches)
    assert ranked == manifest.num_events
    labels = np.concatenate([batch.labels["rating"].numpy() for batch in batches])
    assert 0.2 < labels.mean() < 0.8


@pytest.mark.parametrize("name", ["dirichlet", "urn"])
def test_the_configurations_fit_together(name):
    from gr.config import TrainConfig

    log, _ = load_config(SyntheticConfig, f"configs/synthetic_{name}_log.yaml")
    train, _ = load_config(TrainConfig, f"configs/synthetic_{name}.yaml")
    assert train.data.log == log.output
    made = log.dirichlet if log.stream == "dirichlet" else log.polya_urn
    assert train.data.num_items == made.num_items


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": "dirichlet", "polya_urn": URN}, "polya_urn is set but stream=dirichlet"),
        ({"stream": "polya_urn", "dirichlet": DIRICHLET}, "dirichlet is set but stream=polya_urn"),
        ({"partitions": 0}, "partitions must be at least 1, got 0"),
        ({"start_ts": -1}, "start_ts must be at least 0"),
    ],
)
def test_configurations_that_contradict_themselves(changes, message):
    fields = {"stream": "dirichlet", "output": "x"} | changes
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**fields)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (DirichletConfig, {"alpha": (3.0, 2.0)}, "dirichlet.alpha must be two finite numbers"),
        (DirichletConfig, {"first_record": 9}, "first_record=9 needs initial_fraction=1, got 0.4"),
        (
            DirichletConfig,
            {"initial_fraction": 0.0},
            r"initial_fraction must be in \(0, 1\], got 0",
        ),
        (DirichletConfig, {"max_categories": 101}, "max_categories=101 is more than"),
        (DirichletConfig, {"length": 0}, "length must be at least 1"),
        (PolyaUrnConfig, {"num_items": 12_799}, "expected num_items >= .* = 12800"),
        (PolyaUrnConfig, {"activity": 1.5}, "activity must be within 0 and 1"),
        (PolyaUrnConfig, {"alpha": (0, 5)}, "alpha must be two whole numbers"),
        (PolyaUrnConfig, {"categories_per_user": 129}, "categories_per_user=129 is more than"),
        (PolyaUrnConfig, {"seconds_per_timestamp": 999}, "too short for a session of up to 1000"),
        (PolyaUrnConfig, {"mean_events": 0}, "mean_events must be at least 1"),
    ],
)
def test_numbers_out_of_range(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_too_few_items_for_the_categories_and_outputs_in_use(tmp_path):
    few = DirichletConfig(num_items=10, num_categories=100, num_records=5)
    config = configured(tmp_path / "log", "dirichlet", dirichlet=few)
    with pytest.raises(ValueError, match=r"fewer than dirichlet\.max_categories=5"):
        synthesize(config)
    (tmp_path / "log").mkdir()
    (tmp_path / "log/precious").write_text("x")
    for format, kind in (("sessions", "session-end log"), ("events", "synthetic event log")):
        with pytest.raises(ValueError, match=f"exists and is no {kind}"):
            synthesize(configured(tmp_path / "log", "dirichlet", format=format, overwrite=True))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["log"]


def test_command(tmp_path, capsys):
    from gr.cli import main

    overrides = [
        f"output={tmp_path / 'log'}",
        "polya_urn.num_users=20",
        "polya_urn.num_timestamps=2",
        "partitions=2",
    ]
    assert main(["synthesize", "configs/synthetic_urn_log.yaml", *overrides]) == 0
    manifest = read_manifest(tmp_path / "log")
    assert capsys.readouterr().out == f"wrote {manifest.num_events} events to {tmp_path / 'log'}\n"
    assert main(["synthesize", "configs/synthetic_urn_log.yaml", *overrides]) == 2
    assert "holds a session-end log already" in capsys.readouterr().err


@pytest.mark.parametrize(("repeat", "alpha"), [("category", (1.0, 500.0)), ("item", (1.0, 20.0))])
def test_no_ranking_hits_more_than_one_that_knows_the_process(repeat, alpha):
    """Against the probability of every item, and against what the draws hit."""
    config = DirichletConfig(
        num_items=60,
        num_categories=6,
        num_records=150,
        length=12,
        max_categories=3,
        alpha=alpha,
        repeat=repeat,
    )
    stream = DirichletStream(config, seed=5, start_ts=0)
    records = np.arange(150)
    for k in (3, 25):
        expected, hits = [], []
        for record in records.tolist():
            categories, prior, alpha = stream.parameters(record)
            (made,) = stream.sessions([np.array([record])], 10**6)
            of_item = {}
            for c in range(config.num_categories):
                for item in stream.items[stream.offsets[c] : stream.offsets[c + 1]].tolist():
                    if item < stream.num_open(record):
                        of_item[item] = c
            size = Counter(of_item.values())
            seen = made.columns["category"].tolist()
            for n in range(1, config.length):
                of_category = repeat == "category"
                share = {
                    c: (alpha * h + of_category * seen[:n].count(c)) / (alpha + n)
                    for c, h in zip(categories.tolist(), prior.tolist(), strict=True)
                }
                chance = {i: share.get(c, 0.0) / size[c] for i, c in of_item.items()}
                if not of_category:
                    for i in made.item_id[:n].tolist():
                        chance[i] += 1 / (alpha + n)
                assert sum(chance.values()) == pytest.approx(1)
                best = sorted(chance, key=lambda i: -chance[i])[:k]
                expected.append(sum(chance[i] for i in best))
                hits.append(made.item_id[n] in best)
        bound = stream.best_hit_rate(records, k)
        assert bound == pytest.approx(np.mean(expected), rel=1e-9)
        assert abs(np.mean(hits) - bound) < 4 * np.std(hits) / len(hits) ** 0.5
