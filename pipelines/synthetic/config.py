"""Configuration of the synthetic streams. Free of torch."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING


@dataclass(frozen=True, kw_only=True, slots=True)
class DirichletConfig:
    """Records of a Dirichlet process over categories, whose vocabulary opens over time.

    Defaults are those of the paper. Source: arXiv 2402.17152, appendix C.
    """

    num_items: int = 20_000
    """Item ids are 0 .. num_items - 1; each belongs to one category, drawn uniformly."""
    num_categories: int = 100
    """Categories of the items."""
    num_records: int = 1_000_000
    """Records, one user and one session each."""
    first_record: int = 0
    """Which record of the process is the first: that many of another log make this one what follows
    on it, for evaluation on what no run has read. User ids count from 0 in each log."""
    length: int = 128
    """Events of each record."""
    max_categories: int = 5
    """A record draws from 1 to so many categories, each number as likely."""
    alpha: tuple[float, float] = (1.0, 500.0)
    """Concentration of a record: uniform between these."""
    repeat: Literal["category", "item"] = "category"
    """What an event that is not drawn anew takes of one before it: its category, as the appendix
    says, or the item itself, so that the atoms of the process are items."""
    initial_fraction: float = 0.4
    """Share of the ids that the first record may hold; the rest opens at equal intervals."""
    seconds_per_record: int = 1
    """A record starts so many seconds after the one before; its events are 1 s apart."""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_items", 1),
            ("num_categories", 1),
            ("num_records", 1),
            ("length", 1),
            ("max_categories", 1),
            ("seconds_per_record", 0),
            ("first_record", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"dirichlet.{name} must be at least {least}, got {getattr(self, name)}"
                )
        if len(self.alpha) != 2 or not 0 < self.alpha[0] <= self.alpha[1] < float("inf"):
            raise ValueError(
                "dirichlet.alpha must be two finite numbers, 0 < least <= most, got "
                f"{list(self.alpha)}"
            )
        if not 0 < self.initial_fraction <= 1:
            raise ValueError(
                f"dirichlet.initial_fraction must be in (0, 1], got {self.initial_fraction}"
            )
        if self.first_record and self.initial_fraction < 1:
            raise ValueError(
                f"dirichlet.first_record={self.first_record} needs initial_fraction=1, got "
                f"{self.initial_fraction}: a vocabulary opens over the records of one log"
            )
        if self.max_categories > self.num_categories:
            raise ValueError(
                f"dirichlet.max_categories={self.max_categories} is more than num_categories="
                f"{self.num_categories}: a record's categories are distinct"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PolyaUrnConfig:
    """Users whose interest in categories reinforces itself, as in MLPerf's DLRM-v3 stream.

    Defaults are those of "streaming-100b": 5 M users, 1 G items, 35 G events; scale them down.
    Source: generative_recommenders/dlrm_v3/streaming_synthetic_data.py at 3bac8b6.
    """

    num_users: int = 5_000_000
    """User ids are 0 .. num_users - 1."""
    num_items: int = 1_000_000_000
    """Category c holds the item ids from c * (num_items // num_categories) on."""
    num_categories: int = 128
    """Categories of the items."""
    categories_per_user: int = 4
    """Distinct categories of a user."""
    num_timestamps: int = 100
    """Steps of time t = 0, 1, ...; the histories before them count as t = -1."""
    activity: float = 0.7
    """Probability that a user has a session at a step."""
    mean_events: int = 100
    """Events of a session: normal with this mean and a quarter of it (rounded down) as deviation,
    rounded ..."""
    min_events: int = 33
    """... and not below this."""
    alpha: tuple[int, int] = (1, 500)
    """Concentration of a session: a whole number, uniform between these, both included."""
    seconds_per_timestamp: int = 86_400
    """Length of a step. A session starts anywhere in it and ends within; events are 1 s apart."""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_users", 1),
            ("num_categories", 1),
            ("categories_per_user", 1),
            ("num_timestamps", 1),
            ("mean_events", 1),
            ("min_events", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"polya_urn.{name} must be at least {least}, got {getattr(self, name)}"
                )
        if self.categories_per_user > self.num_categories:
            raise ValueError(
                f"polya_urn.categories_per_user={self.categories_per_user} is more than "
                f"num_categories={self.num_categories}: a user's categories are distinct"
            )
        if self.num_items // self.num_categories < self.num_timestamps:
            raise ValueError(
                f"polya_urn.num_items={self.num_items} leaves a category without items at the "
                "first step: expected num_items >= num_categories * num_timestamps = "
                f"{self.num_categories * self.num_timestamps}"
            )
        if not 0 <= self.activity <= 1:
            raise ValueError(f"polya_urn.activity must be within 0 and 1, got {self.activity}")
        if len(self.alpha) != 2 or not 1 <= self.alpha[0] <= self.alpha[1]:
            raise ValueError(
                "polya_urn.alpha must be two whole numbers, 1 <= least <= most, got "
                f"{list(self.alpha)}"
            )
        # 36 deviations from the mean: a draw of 53 bits does not reach 9 of them.
        longest = max(10 * self.mean_events, self.min_events)
        if self.seconds_per_timestamp < longest:
            raise ValueError(
                f"polya_urn.seconds_per_timestamp={self.seconds_per_timestamp} is too short for a "
                f"session of up to {longest} events, one a second: raise it"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """What `gr synthesize` makes."""

    stream: Literal["dirichlet", "polya_urn"] = MISSING
    """Which of the two."""
    output: str = MISSING
    """Folder of the result."""
    overwrite: bool = False
    """Replace a log of the same format that is already there. Anything else there is refused."""
    format: Literal["sessions", "events"] = "sessions"
    """sessions: a session-end log for `gr train`; events: an event log for `gr sessionize`
    (OUTPUT/events, and OUTPUT/history where users start with one)."""
    seed: int = 0
    """Of every draw."""
    partitions: int = 64
    """Number of files; of a session-end log the upper bound of the number of ranks."""
    partition_seed: int = 0
    """Seed of the hash of user_id that chooses the partition."""
    start_ts: int = 1_640_995_200
    """Start of the stream, s since 1970 (1 January 2022, UTC)."""
    chunk_events: int = 1 << 19
    """Events held in memory at once by a thread (about); changes no byte."""
    threads: int = 0
    """Files written at once; 0 means one a core. Changes no byte."""
    dirichlet: DirichletConfig = field(default_factory=DirichletConfig)
    """Of stream: dirichlet."""
    polya_urn: PolyaUrnConfig = field(default_factory=PolyaUrnConfig)
    """Of stream: polya_urn."""

    def __post_init__(self) -> None:
        for name, least in (
            ("seed", 0),
            ("partitions", 1),
            ("partition_seed", 0),
            ("chunk_events", 1),
            ("threads", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        before = self.polya_urn.seconds_per_timestamp if self.stream == "polya_urn" else 0
        if self.start_ts < before:
            raise ValueError(
                f"start_ts must be at least {before}, so that no time is negative, got "
                f"{self.start_ts}"
            )
        if self.stream == "dirichlet" and self.polya_urn != PolyaUrnConfig():
            raise ValueError("polya_urn is set but stream=dirichlet does not read it: remove it")
        if self.stream == "polya_urn" and self.dirichlet != DirichletConfig():
            raise ValueError("dirichlet is set but stream=polya_urn does not read it: remove it")
