"""Plain-Python oracle of SessionStream, written from docs/design.md: one session after another.

Sequences are dictionaries of lists; positions count from the head of the sequence.
"""

import math
import struct

from pipelines.config import DataConfig

M64 = (1 << 64) - 1
CONTEXT, ITEM, ACTION, EVENT, CANDIDATE = range(5)
WINDOW_SECONDS = {"hour": 3600, "day": 86400}


def mix(x):
    """SplitMix64, on Python integers."""
    z = (x + 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def sequence_key(seed, purpose, user, session, piece):
    key = mix(seed & M64) ^ purpose
    key = mix(key) ^ (user & M64)
    key = mix(key) ^ (session & M64)
    return mix(mix(key) ^ piece)


def uniform(key):
    return (mix(key) >> 11) / 2**53


def draw(key, i):
    """Return the i-th 64-bit draw of a key."""
    return mix((key + i * 0x9E3779B97F4A7C15) & M64)


def choose_newest(n, k, key, ages):
    return set(range(n - k, n))


def choose_uniformly(n, k, key, ages):
    """Floyd's sampling, of the dropped ones where they are fewer."""
    size, drawn = min(k, n - k), set()
    for i in range(n - size, n):
        one = (draw(key, i) >> 32) * (i + 1) >> 32
        drawn.add(i if one in drawn else one)
    return drawn if size == k else set(range(n)) - drawn


def choose_by_age(n, k, key, ages):
    """One after another: a uniform draw that is accepted with probability 1 - age / sum of ages."""
    drawn, i = set(), 0
    while len(drawn) < k:
        bits = draw(key, i)
        i += 1
        one = (bits >> 32) * n >> 32
        if one not in drawn and (bits & 0xFFFFFFFF) / 2**32 * sum(ages) >= ages[one]:
            drawn.add(one)
    return drawn


CHOOSE = {"greedy": choose_newest, "random": choose_uniformly, "weighted": choose_by_age}


def unknown(value):
    return value is None or (isinstance(value, float) and math.isnan(value))


def feature_id(value, feature):
    if unknown(value):
        return -1
    if feature.boundaries:
        return sum(bound <= float(value) for bound in feature.boundaries)
    return int(value)


def kept_value(value, feature):
    """Return an id, a list of ids, or a number (None where it is unknown)."""
    if feature.is_bag:
        ids = [-1] if value is None else [feature_id(v, feature) for v in value]
        return ids[: feature.max_values]
    if feature.is_number:
        return None if unknown(value) else struct.unpack("f", struct.pack("f", value))[0]
    return feature_id(value, feature)


def action_code(value, action):
    return 0 if unknown(value) else 1 + sum(bound <= float(value) for bound in action.thresholds)


def task_label(value, task):
    """Return the label, or None where it is unknown."""
    if unknown(value):
        return None
    x = float(value)
    if task.type == "binary":
        return 1.0 if x >= task.threshold else 0.0
    x /= task.scale
    if task.maximum > 0:
        x = min(x, task.maximum)
    if task.log1p:
        return math.log1p(x) if x > -1 else -math.inf
    return x


def reject_reason(row, config: DataConfig):
    """Return why a session cannot be used, or None."""
    keys = [row[k] for k in ("user_id", "session_id", "start_ts", "end_ts")]
    events = row["events"] or []
    if any(k is None for k in keys):
        return "null user_id, session_id, start_ts or end_ts"
    if not events:
        return "no events"
    if any(e is None or e["item_id"] is None or e["timestamp"] is None for e in events):
        return "null event, item_id or timestamp"
    if any(e["item_id"] < 0 for e in events):
        return "negative item_id"
    times = [e["timestamp"] for e in events]
    year_10000 = 253402300800
    if not all(0 <= t < year_10000 for t in (*times, row["start_ts"], row["end_ts"])):
        return "timestamp before 1970 or after 9999"
    if times != sorted(times):
        return "event timestamps not ascending"
    if times[0] < row["start_ts"] or times[-1] > row["end_ts"]:
        return "event outside start_ts .. end_ts"
    if config.tasks:
        numbers = [task_label(e.get(t.action), t) for e in events for t in config.tasks.values()]
        numbers += [e.get(name) for e in events for name in config.dense_features]
    else:
        numbers = []
    for rows, features in (
        (events, config.item_features),
        ([row["context"]], config.context_features),
    ):
        numbers += [
            (e or {}).get(f.column or name)
            for e in rows
            for name, f in features.items()
            if f.is_number
        ]
    if any(x is not None and math.isinf(x) for x in numbers):
        return "label or dense feature not finite"
    return None


def is_cut(row, name, feature):
    """Return whether a bag lacks values of the log."""
    return (
        feature.is_bag and len((row or {}).get(feature.column or name) or ()) > feature.max_values
    )


def with_context(row):
    return [event | {"context": row["context"]} for event in row["events"]]


class Oracle:
    """Yields the sequences of each global step of a log given as lists of rows."""

    def __init__(self, config: DataConfig, partitions, histories=None, *, seed):
        self.config, self.seed = config, seed
        self.partitions = partitions
        self.seen = {}  # user -> every event ever appended, in the order of arrival
        self.rejects = []
        for p, rows in enumerate(histories or []):
            for number, row in enumerate(rows):
                if self.usable(p, number, row):
                    self.seen.setdefault(row["user_id"], []).extend(with_context(row))

    def usable(self, partition, number, row):
        reason = reject_reason(row, self.config)
        if reason is not None:
            self.rejects.append((partition, number, reason))
        return reason is None

    def steps(self):
        """Yield (window, rows consumed per partition, sequences, rejects) of each step."""
        config, count = self.config, len(self.partitions)
        at = [0] * count

        def window(p):
            if at[p] == len(self.partitions[p]):
                return None
            if config.window == "none":
                return 0
            newest_first = (self.partitions[p][i]["end_ts"] for i in range(at[p], -1, -1))
            known = next((t for t in newest_first if t is not None), 0)
            time = known + config.window_offset_seconds
            return time // WINDOW_SECONDS[config.window]

        while any(window(p) is not None for p in range(count)):
            current = min(w for p in range(count) if (w := window(p)) is not None)
            sequences = []
            for p in range(count):
                for _ in range(config.sessions_per_partition):
                    if window(p) != current:
                        break
                    row = self.partitions[p][at[p]]
                    if self.usable(p, at[p], row):
                        sequences += self.session(p, row)
                    at[p] += 1
            rejects, self.rejects = self.rejects, []
            yield current, tuple(at), sequences, rejects

    def session(self, partition, row):
        config, user = self.config, row["user_id"]
        sequences = []
        size = config.max_session_events
        for piece, first in enumerate(range(0, len(row["events"]), size)):
            events = with_context(row)[first : first + size]
            anchor = row["start_ts"] if piece == 0 else events[0]["timestamp"]
            seen = self.seen.setdefault(user, [])
            budget = config.max_history_tokens // (2 if config.layout == "interleaved" else 1)
            keep = budget + config.overlap_slack
            ordered = sorted(seen, key=lambda e: e["timestamp"])  # stable: ties by arrival
            retained = ordered[max(0, len(ordered) - keep) :]
            past = [e for e in retained if e["timestamp"] < anchor]
            history = past[max(0, len(past) - budget) :]
            forgot = len(history) < budget and len(ordered) > keep
            everything = [e for e in ordered if e["timestamp"] < anchor]
            if not forgot:
                assert history == everything[max(0, len(everything) - budget) :]
            n = len(history) + len(events)
            kept = True
            if config.supervise == "sampled":
                key = sequence_key(self.seed, 2, user, row["session_id"], piece)
                kept = uniform(key) * n < config.sampled_rate
            history = self.shortened(history, events, anchor, user, row["session_id"], piece)
            if kept:
                sequence = self.lay_out(history, events, anchor, user)
                sequence |= {
                    "user_id": user,
                    "session_id": row["session_id"],
                    "partition": partition,
                    "clipped": forgot,
                    "negatives": self.negatives(user, row["session_id"], piece),
                }
                sequences.append(sequence)
            seen.extend(events)
        return sequences

    def shortened(self, history, events, anchor, user, session, piece):
        """Stochastic length: return the events of history that stay."""
        config, settings = self.config, self.config.stochastic_length
        if settings.selection == "none":
            return history
        longest = settings.max_length or config.max_history_tokens
        limit = 0  # the largest whole T with T <= longest^(alpha / 2)
        while (limit + 1) ** (2 / settings.alpha) <= longest * (1 + 1e-12):
            limit += 1

        def num_tokens(history):
            return len(self.lay_out(history, events, anchor, user)["kind"])

        n = num_tokens(history)
        if n <= limit:
            return history
        if (
            uniform(sequence_key(self.seed, 3, user, session, piece))
            < longest**settings.alpha / n**2
        ):
            return history
        if settings.selection == "greedy" or config.context != "merged":
            k = len(history)  # the most of the newest that are not too many tokens
            while k > 0 and num_tokens(history[-k:]) > limit:
                k -= 1
        else:  # room for all series of the whole sequence, whichever events stay
            per_event = 2 if config.layout == "interleaved" else 1
            k = max(0, limit - n + len(history) * per_event) // per_event
        key = sequence_key(self.seed, 4, user, session, piece)
        ages = [anchor - e["timestamp"] for e in history]
        chosen = CHOOSE[settings.selection](len(history), k, key, ages)
        return [e for i, e in enumerate(history) if i in chosen]

    def negatives(self, user, session, piece):
        key = sequence_key(self.seed, 1, user, session, piece)
        return [draw(key, i) % self.config.num_items for i in range(self.config.num_negatives)]

    def lay_out(self, history, events, anchor, user):
        config = self.config
        interleaved, candidates = config.layout == "interleaved", config.anchor == "session"
        tokens = []
        features = config.context_features.items()

        def context_of(event):
            row = {"user_id": user, **(event["context"] or {})}
            return {name: kept_value(row.get(f.column or name), f) for name, f in features}

        found = {name: [value] for name, value in context_of(events[0]).items()}
        if config.context == "merged":
            found = {name: [] for name in config.context_features}
        if config.context == "prefix":
            tokens = [(CONTEXT, anchor) for _ in features]
        num_context = len(tokens)
        last_known = {}
        num_cut = sum(
            is_cut(e, name, f) for e in events for name, f in config.item_features.items()
        )
        if config.context == "prefix":
            num_cut += sum(is_cut(events[0]["context"], name, f) for name, f in features)
        ranking, retrieval, codes = [], [], []
        start_of_session = None
        last_of_history = None
        for i, event in enumerate([*history, *events]):
            in_session = i >= len(history)
            if i == len(history):
                start_of_session = len(tokens)
            if config.context == "merged":
                time = anchor if in_session and candidates else event["timestamp"]
                for name, value in context_of(event).items():
                    if value not in (None, -1, [-1], last_known.get(name, "none yet")):
                        found[name].append((len(tokens), value))
                        tokens.append((CONTEXT, time))
                        last_known[name] = value
                        f = config.context_features[name]
                        num_cut += in_session and is_cut(event["context"], name, f)
            if i == len(history):
                last_of_history = len(tokens) - 1 if history else None
            supervised = in_session or config.supervise != "session"
            positive = not config.positive or any(
                not unknown(event.get(a)) and float(event[a]) >= 0.5 for a in config.positive
            )
            if supervised and positive:
                before = last_of_history if candidates else (len(tokens) - 1 if i > 0 else None)
                if before is not None:
                    retrieval.append((before, event["item_id"]))
            if supervised and config.tasks:
                labels = {k: task_label(event.get(t.action), t) for k, t in config.tasks.items()}
                dense = [event.get(name) for name in config.dense_features]
                ranking.append((len(tokens), labels, dense))
            if in_session and candidates:
                tokens.append((CANDIDATE, anchor))
                continue
            tokens.append((ITEM if interleaved else EVENT, event["timestamp"]))
            if interleaved:
                tokens.append((ACTION, event["timestamp"]))
            codes.append([action_code(event.get(a), c) for a, c in config.actions.items()])
        everything = [*history, *events]
        times = [t for _, t in tokens]
        return {
            "kind": [k for k, _ in tokens],
            "timestamp": times,
            "query_time": [*times[1:], times[-1]],
            "num_context": num_context,
            "session_start": start_of_session,
            "num_candidates": len(events) if candidates else 0,
            "item_id": [e["item_id"] for e in everything],
            "item_features": {
                name: [kept_value(e.get(f.column or name), f) for e in everything]
                for name, f in config.item_features.items()
            },
            "context": found,
            "action_codes": codes,
            "ranking": ranking,
            "retrieval": retrieval,
            "num_events": len(events if config.supervise == "session" else everything),
            "num_cut": num_cut,
        }
