import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.config import EncodingConfig
from gr.encodings import TokenEncoding, periodic, sinusoids, time_bucket
from tests.gr.hstu_oracle import make_info, make_sequences

DIM = 6
SHANGHAI = 8 * 3600
OPTIONS = {
    "none": {"position": "none"},
    "from_start": {"position": "from_start"},
    "from_session": {"position": "from_session"},
    "from_end": {"position": "from_end"},
    "few_rows": {"position": "from_session", "position_buckets": 5},
    "few_rows_end": {"position": "from_end", "position_buckets": 4},
    "few_rows_start": {"position": "from_start", "position_buckets": 4},
    "sqrt": {"time": "sqrt"},
    "log": {"time": "log"},
    "few_times": {"time": "sqrt", "time_buckets": 8},
    "hour": {"periodic": ("hour",)},
    "all": {"time": "log", "periodic": ("weekday", "hour")},
    "gap": {"gap": "log"},
    "few_gaps": {"gap": "log", "gap_buckets": 4, "position": "none"},
    "sinusoid": {"hour_sinusoid": True},
    "unscaled": {"scale_by_sqrt_dim": False, "time": "sqrt"},
}
STRUCTURES = [
    ([4, 1, 0, 3], [2, 1, 0, 3], None, 0),
    ([5, 2, 7], [2, 0, 1], None, 2),
    ([6, 5, 3], [3, 2, 1], [3, 2, 1], 2),
]


def oracle(x_LD, sequences, num_context, config, parameters, utc_offset):
    """Token by token, from the formulas."""
    rows = []
    for sequence in sequences:
        if sequence.session_start < sequence.length:
            start = sequence.timestamps[sequence.session_start]
        elif sequence.length:
            start = sequence.query_times[-1]
        history = sequence.length - sequence.num_candidates
        for i, seconds in enumerate(sequence.timestamps):
            x = x_LD[len(rows)]
            x = x * math.sqrt(x.numel()) if config.scale_by_sqrt_dim else x
            if config.position != "none":
                place = i if i < history else history
                free = config.position_buckets - num_context
                if i < num_context:
                    index = i
                elif config.position == "from_start":
                    index = place
                elif config.position == "from_end":
                    index = num_context + history - place
                else:
                    signed = place - sequence.session_start
                    signed = max(-(free // 2), min(free - free // 2 - 1, signed))
                    index = num_context + free // 2 + signed
                x = x + parameters["position.weight"][min(index, config.position_buckets - 1)]
            if config.time != "none":
                age = start - seconds
                if config.time == "sqrt":
                    bucket = int(math.sqrt(max(age, 1e-6) / 60))
                else:
                    bucket = math.floor(math.log(max(1, age)) / 0.301)
                x = x + parameters["time.weight"][max(0, min(config.time_buckets - 1, bucket))]
            if config.gap != "none":
                before = min(i, history) - 1
                gap = seconds - sequence.timestamps[before] if before >= 0 else 0
                bucket = math.floor(math.log(max(1, gap)) / 0.301)
                x = x + parameters["gap.weight"][min(config.gap_buckets - 1, bucket)]
            if config.hour_sinusoid:
                hour = (seconds + utc_offset) // 3600 % 24
                angles = [hour / 10_000 ** (2 * (d // 2) / DIM) for d in range(DIM)]
                waves = [math.cos(a) if d % 2 else math.sin(a) for d, a in enumerate(angles)]
                x = x + torch.tensor(waves, dtype=torch.float64)
            if config.periodic:
                features = []
                for name in config.periodic:
                    period = {"hour": 24 * 3600, "weekday": 7 * 24 * 3600}[name]
                    angle = 2 * math.pi * ((seconds + utc_offset) % period) / period
                    features += [math.sin(angle), math.cos(angle)]
                weight = parameters["periodic.weight"]
                x = x + parameters["periodic.bias"]
                x = x + sum(f * weight[:, n] for n, f in enumerate(features))
            rows.append(x)
    return torch.stack(rows)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("options", OPTIONS)
def test_matches_the_formulas(options, structure):
    lengths, tails, candidates, num_context = structure
    config = EncodingConfig(**OPTIONS[options])
    torch.manual_seed(0)
    encoding = TokenEncoding(config, DIM, utc_offset_seconds=SHANGHAI).double()
    sequences = make_sequences(lengths, tails, candidates, max_gap=2_000_000)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in encoding.named_parameters()}
    x_actual = torch.randn(sum(lengths), DIM, dtype=torch.float64, requires_grad=True)
    x_expected = x_actual.detach().clone().requires_grad_()
    actual = encoding(x_actual, make_info(sequences, num_context))
    expected = oracle(x_expected, sequences, num_context, config, parameters, SHANGHAI)
    # The periodic features and the sinusoids are float32.
    close = {"rtol": 0.0, "atol": 1e-6 if config.periodic or config.hour_sinusoid else 1e-14}
    torch.testing.assert_close(actual, expected, **close)

    weights = torch.randn(expected.shape, dtype=torch.float64)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x_actual.grad, x_expected.grad, **close)
    for name, parameter in encoding.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("position", ["from_start", "from_session", "from_end"])
def test_no_token_shares_its_position_but_candidates(position):
    sequences = make_sequences([20], [8], [4])
    encoding = TokenEncoding(EncodingConfig(position=position), DIM)
    with torch.no_grad():
        encoding.position.weight.copy_(torch.arange(1024.0)[:, None].expand(-1, DIM))
        added = encoding(torch.zeros(20, DIM), make_info(sequences, num_context=3))[:, 0].tolist()
    assert len(set(added[:17])) == 17
    assert len(set(added[16:])) == 1
    assert added[:3] == [0, 1, 2]


@pytest.mark.parametrize("position", ["from_start", "from_session", "from_end"])
@pytest.mark.parametrize("time", ["none", "sqrt", "log"])
def test_history_does_not_tell_how_long_the_session_is(position, time):
    """from_end is the control: it does, hence gr.config wants data.anchor=session with it."""
    config = EncodingConfig(position=position, time=time, periodic=("hour",), gap="log")
    torch.manual_seed(0)
    encoding = TokenEncoding(config, DIM)
    (sequence,) = make_sequences([12], [5])
    x_LD = torch.randn(12, DIM)
    whole = encoding(x_LD, make_info([sequence], num_context=2))
    leaked = False
    for length in (8, 11):
        shorter = replace(
            sequence,
            length=length,
            tail=length - 7,
            timestamps=sequence.timestamps[:length],
            query_times=sequence.query_times[:length],
        )
        cut = encoding(x_LD[:length], make_info([shorter], num_context=2))
        leaked |= not torch.equal(cut, whole[:length])
    assert leaked == (position == "from_end")


def test_without_a_session_age_counts_from_the_request():
    """Nor does it count from the first token of the next sequence."""
    (sequence, other) = make_sequences([5, 3], [0, 2])
    assert sequence.session_start == 5
    encoding = TokenEncoding(EncodingConfig(position="none", time="log"), DIM)
    info = make_info([sequence, other])
    alone = encoding(torch.zeros(5, DIM), make_info([sequence]))
    assert torch.equal(encoding(torch.zeros(8, DIM), info)[:5], alone)
    later = replace(sequence, query_times=[*sequence.query_times[:-1], 2_000_000_000])
    assert not torch.equal(alone, encoding(torch.zeros(5, DIM), make_info([later])))


def test_empty_batches():
    config = EncodingConfig(time="sqrt", periodic=("hour", "weekday"), dropout=0.1)
    encoding = TokenEncoding(config, DIM)
    for lengths in ([], [0], [0, 0]):
        info = make_info(make_sequences(lengths, lengths))
        encoded = encoding(torch.zeros(0, DIM), info)
        assert encoded.shape == (0, DIM)
        encoding.zero_grad()
        encoded.sum().backward()
        for parameter in encoding.parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10_000), st.integers(-2, 2))
def test_sqrt_buckets_are_exact_beside_their_thresholds(root, beside):
    seconds = max(60 * root * root + beside, 0)
    bucket = time_bucket(torch.tensor([seconds]), kind="sqrt", buckets=1 << 20)
    assert bucket.item() == math.isqrt(seconds // 60)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 100), st.integers(-1, 2))
def test_log_buckets_are_exact_beside_their_thresholds(bucket, beside):
    getcontext().prec = 60
    width = Decimal("0.301")
    seconds = max(int((width * bucket).exp()) + beside, 1)
    expected = int(Decimal(seconds).ln() / width)
    actual = time_bucket(torch.tensor([seconds]), kind="log", buckets=1 << 20)
    assert actual.item() == expected


@pytest.mark.parametrize("kind", ["sqrt", "log"])
def test_times_after_the_session_start_and_long_ages_are_clamped(kind):
    ages = torch.tensor([-(10**9), -1, 0, 10**9])
    assert time_bucket(ages, kind=kind, buckets=16).tolist() == [0, 0, 0, 15]


@settings(deadline=None, max_examples=100)
@given(
    st.datetimes(datetime(2000, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC)),
    st.integers(-12, 14),
)
def test_hour_and_weekday_are_those_of_the_calendar(moment, offset_hours):
    seconds = int(moment.timestamp())
    local = datetime.fromtimestamp(seconds, timezone(timedelta(hours=offset_hours)))
    of_day = local.hour * 3600 + local.minute * 60 + local.second
    since_thursday = (local.weekday() - 3) % 7 * 86_400 + of_day  # 1 January 1970 was one
    time_L = torch.tensor([seconds + offset_hours * 3600])
    for period, passed in ((86_400, of_day), (604_800, since_thursday)):
        angle = 2 * math.pi * passed / period
        expected = torch.tensor([[math.sin(angle), math.cos(angle)]])
        torch.testing.assert_close(periodic(time_L, period), expected, rtol=0.0, atol=1e-6)


def test_23h_is_as_close_to_0h_as_1h():
    hour = periodic(torch.tensor([0, 1, 23]) * 3600, 86_400)
    assert (hour[0] @ hour[1]).item() == pytest.approx((hour[0] @ hour[2]).item(), abs=1e-6)


def test_tables_start_uniform_and_periodic_terms_small():
    torch.manual_seed(0)
    config = EncodingConfig(position_buckets=256, time="sqrt", time_buckets=2048)
    encoding = TokenEncoding(replace(config, periodic=("hour", "weekday")), 64)
    for table, rows in ((encoding.position, 256), (encoding.time, 2048)):
        bound = (1 / rows) ** 0.5
        assert table.weight.shape == (rows, 64)
        assert 0.99 * bound < table.weight.abs().max() <= bound
        assert table.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert encoding.periodic.weight.std().item() == pytest.approx(0.02, rel=0.2)
    normal = TokenEncoding(replace(config, position_std=0.3), 64)
    assert normal.position.weight.std().item() == pytest.approx(0.3, rel=0.02)
    assert set(encoding.state_dict()) == {
        "position.weight",
        "time.weight",
        "periodic.weight",
        "periodic.bias",
    }


def test_dropout_is_on_the_sum_and_in_training_only():
    encoding = TokenEncoding(EncodingConfig(position="from_start", dropout=0.25), 64)
    info = make_info(make_sequences([50], [50]))
    x_LD = torch.randn(50, 64)
    kept = encoding.eval()(x_LD, info)
    torch.manual_seed(1)
    dropped = encoding.train()(x_LD, info)
    zero = dropped == 0
    assert zero.float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(dropped[~zero], kept[~zero] / 0.75)


def test_a_position_table_without_room_is_refused():
    encoding = TokenEncoding(EncodingConfig(position_buckets=4), DIM)
    info = make_info(make_sequences([5], [1]), num_context=3)
    with pytest.raises(
        ValueError, match=r"position_buckets .* 3 context tokens, got 4.* 5 or more"
    ):
        encoding(torch.zeros(5, DIM), info)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("position_buckets", 1),
        ("time_buckets", 0),
        ("periodic", ("hour", "hour")),
        ("dropout", 1.5),
    ],
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(ValueError, match=rf"model\.encoding\.{setting} "):
        EncodingConfig(**{setting: value})


def test_the_hours_of_the_sinusoid_do_not_close_a_circle():
    """The claim that 23 h and 0 h are encoded close does not hold: noon is closer to midnight."""
    hours = sinusoids(24, 64)
    similarity = (hours @ hours.T)[0] / (hours[0] @ hours[0])
    expected = torch.tensor([0.966, 0.667, 0.578])
    torch.testing.assert_close(similarity[[1, 12, 23]], expected, rtol=0.0, atol=5e-4)
