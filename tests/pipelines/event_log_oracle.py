"""sessionize in plain Python, one row at a time, written from its documentation."""

import hashlib
import math
from collections import Counter

LAST_SECOND = 253_402_300_800


def partition(user: int, seed: int, partitions: int) -> int:
    p = 2147483647
    low, middle, top = user % 2**31, (user // 2**31) % 2**31, (user // 2**62) % 4
    low, middle = (0 if x == 2**31 else x for x in (low, middle))
    h = (low * 1103515245) % p + (middle * 1664525017) % p
    h = (h + top * 69069931 + seed % p) % p
    h = ((h ^ (h // 2**15)) * 747796405) % p
    h = ((h ^ (h // 2**13)) * 1597334677) % p
    return (h ^ (h // 2**16)) % partitions


def identity(value):
    """Strings are the first 16 hexadecimal digits of their MD5, less the top bit."""
    if isinstance(value, list):
        return [identity(x) for x in value]
    if isinstance(value, str):
        return int(hashlib.md5(value.encode()).hexdigest()[:16], 16) % 2**63
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def values_of(config, column, value):
    """Return the values of a text that is to be split."""
    if column not in config.split or value is None:
        return value
    return [x for x in value.split(config.split[column]) if x]


def reject_reason(config, row, is_log):
    per_second = {"s": 1, "ms": 1000, "us": 1_000_000}[config.timestamp_unit]
    user, item, time = (row[x] for x in (config.user_id, config.item_id, config.timestamp))
    if user is None:
        return f"{config.user_id} is null"
    if item is None:
        return f"{config.item_id} is null"
    if time is None:
        return f"{config.timestamp} is null"
    if time < 0:
        return f"{config.timestamp} is negative"
    if time >= LAST_SECOND * per_second:
        return (
            f"{config.timestamp} is after the year 9999 in timestamp_unit={config.timestamp_unit}"
        )
    if isinstance(item, int) and item < 0:
        return f"{config.item_id} is negative"
    if config.session_id and is_log and row[config.session_id] is None:
        return f"{config.session_id} is null"
    return None


def read_events(config, rows, is_log, tables):
    """Return (usable events in file order, rejects by reason, repeats)."""
    factor = {"s": 1_000_000, "ms": 1000, "us": 1}[config.timestamp_unit]
    events, rejects, seen, repeats = [], Counter(), set(), 0
    order = config.order
    numbered = list(enumerate(rows))
    if order:
        numbered.sort(key=lambda x: (x[1][order] is None, x[1][order] or 0))
    for index, row in numbered:
        reason = reject_reason(config, row, is_log)
        if reason:
            rejects[reason] += 1
            continue
        own = {
            x: identity(values_of(config, x, row.get(x)))
            for x in (*config.actions, *config.features, *config.context)
        }
        key = (row[config.user_id], row[config.item_id], row[config.timestamp])
        if config.duplicates == "exact":
            key += (row.get(config.session_id), *map(repr, own.values()))
        if config.duplicates != "keep" and key in seen:
            repeats += 1
            continue
        seen.add(key)
        event = {x: own[x] for x in (*config.actions, *config.features)}
        context = {x: own[x] for x in config.context}
        for join, table in zip(config.joins, tables, strict=True):
            match = table.get(row.get(join.key), {})
            into = event if join.into == "event" else context
            into.update({new: identity(match.get(old)) for new, old in join.columns.items()})
        time = row[config.timestamp] * factor
        rank = row.get(order) if order else 0
        events.append(
            {
                "user": identity(row[config.user_id]),
                "item": identity(row[config.item_id]),
                "time": time,
                "place": (time, rank is None, rank or 0, is_log, index),
                "session": identity(row.get(config.session_id)),
                "event": event,
                "context": context,
            }
        )
    return events, rejects, repeats


def counters(config, event, everything):
    """Return the columns of all counters at one event."""
    out = {}
    for prefix, counter in config.counters.items():
        names = {config.user_id: "user", config.item_id: "item"}

        def key(e, counter=counter, names=names):
            return [e[names[k]] if k in names else e["event"][k] for k in counter.keys]

        mine = key(event)
        earliest = event["time"] - counter.days * 86400 * 10**6 if counter.days else 0
        past = [e for e in everything if earliest <= e["time"] < event["time"] and key(e) == mine]
        values = {a: [e["event"][a] for e in past] for a in (*counter.actions, *counter.known)}
        known = {a: [x for x in v if x is not None] for a, v in values.items()}
        columns = {f"{prefix}_count": len(past)}
        columns |= {f"{prefix}_{a}": float(sum(known[a])) for a in counter.actions}
        columns |= {f"{prefix}_known_{a}": len(known[a]) for a in counter.known}
        out |= dict.fromkeys(columns) if None in mine else columns
    return out


def session_log(config, log, history=(), tables=()):
    """Return (rows of each partition, history rows of each partition, rejects, repeats)."""
    events, rejects, repeats = read_events(config, log, True, tables)
    past, more_rejects, more_repeats = read_events(config, history, False, tables)
    everything = events + past
    sessions = {}
    last = {}
    for e in sorted(events, key=lambda e: e["place"]):
        user = e["user"]
        name = e["session"]
        if not config.session_id:
            time, name = last.get(user, (e["time"], 0))
            if e["time"] - time > config.gap_seconds * 10**6:
                name += 1
            last[user] = (e["time"], name)
        e["event"] = e["event"] | counters(config, e, everything)
        sessions.setdefault((user, name), []).append(e)
    blank = dict.fromkeys(counters(config, events[0], []))
    before = {}
    for e in sorted(past, key=lambda e: e["place"]):
        e["event"] = e["event"] | blank
        before.setdefault((e["user"], -1), []).append(e)
    return (
        laid_out(config, sessions),
        laid_out(config, before),
        rejects + more_rejects,
        (repeats + more_repeats),
    )


def laid_out(config, sessions):
    rows = [[] for _ in range(config.partitions)]
    for (user, name), events in sessions.items():
        row = {
            "user_id": user,
            "session_id": name,
            "start_ts": events[0]["time"] // 10**6,
            "end_ts": events[-1]["time"] // 10**6,
            "context": events[0]["context"],
            "events": [
                {"item_id": e["item"], "timestamp": e["time"] // 10**6, **e["event"]}
                for e in events
            ],
        }
        rows[partition(user, config.partition_seed, config.partitions)].append(row)
    for part in rows:
        part.sort(key=lambda r: (r["end_ts"], r["user_id"], r["session_id"]))
    return rows
