"""Published comparisons from finished runs: a small record of each, and a page made of records.

A row of a table is a configuration; a record is that row at one seed, made of two runs that differ
in data.leave_one_out.hold_out. The validation run says which epoch to take, and only it; the test
run, trained on one more event of each user, says what that epoch is worth. What the same run would
be worth at the epoch that looks best on the test events is kept beside it: the rule of many papers.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import MISSING

from gr.atomic import write_atomically
from gr.config_io import load_config
from gr.runlog import COMMIT, FACTS
from gr.runs import Run, read_run

if TYPE_CHECKING:
    from gr.studies import StudyRecord

HOLD_OUT = "data.leave_one_out.hold_out"
METRICS = ("hr@10", "hr@50", "hr@200", "ndcg@10", "ndcg@50", "ndcg@200", "mrr")
_RUN_NAME = re.compile(r"(?P<row>.+)_s\d+_[0-9a-f]+")
"""Of the folder of a sweep's run."""
# What two runs of one record may differ in, and what says nothing about the result. Layers as
# graphs, and what is computed again, change it by rounding, if at all.
FREE = (
    *("run_dir", "resume", HOLD_OUT, "data.log", "log_every", "timeout_minutes"),
    *("model.hstu.graph_tokens", "model.hstu.recompute"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowConfig:
    """A row of a table."""

    title: str = MISSING
    """Name of the model."""
    config: str = MISSING
    """What `gr train` takes: a file and overrides."""
    published: dict[str, float] = field(default_factory=dict)
    """Metric -> published figure; empty if there is none."""
    within: float = 0.0
    """Target: largest relative distance below the published figures; 0 means no target."""
    aims: dict[str, float] = field(default_factory=dict)
    """Metric -> figure to reach, of HR@10 and NDCG@10."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """Rows on one dataset."""

    title: str = MISSING
    """Name of the dataset."""
    note: str = ""
    """What a reader must know about the data."""
    source: str = ""
    """Where the published figures stand."""
    baselines: tuple[str, ...] = ()
    """Rows with each of which the others are compared, seed by seed."""
    rows: dict[str, RowConfig] = MISSING
    """Name of a sweep's run -> row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """A question that runs of one pass answer, each a row of its own (gr/studies.py)."""

    title: str = MISSING
    """The question."""
    note: str = ""
    """What was done, and what a reader must know, in Markdown."""
    conclusion: str = ""
    """What came of it, in plain words."""
    sweep: str = MISSING
    """File of the sweep that runs all rows."""
    metrics: tuple[str, ...] = MISSING
    """The first decides. train/tokens and train/flops are sums over the training; NAME:last is of
    the latest window in any case."""
    window: Literal["all", "last"] = "all"
    """all: the pass, its beginning included; last: its latest window (hour, day)."""
    baselines: tuple[str, ...] = ()
    """Rows with each of which the others are compared, seed by seed."""
    rows: dict[str, RowConfig] = MISSING
    """Name of a sweep's run -> row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageConfig:
    """A page of results (configs/published/results.yaml)."""

    title: str = MISSING
    """Heading."""
    text: str = ""
    """Below the heading: what was done, in Markdown."""
    choose_by: str = "ndcg@10"
    """Metric whose best value chooses the epoch."""
    tables: dict[str, TableConfig] = MISSING
    """Name, of its plot too -> table."""
    studies: dict[str, StudyConfig] = field(default_factory=dict)
    """Name -> study; they stand below the tables."""

    @property
    def parts(self) -> "dict[str, TableConfig | StudyConfig]":
        """Tables and studies."""
        return {**self.tables, **self.studies}

    def __post_init__(self) -> None:
        parts = self.parts
        names = [name for part in parts.values() for name in part.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"row(s) {twice} stand in two tables: a run belongs to one row")
        for name, part in parts.items():
            for baseline in part.baselines:
                if baseline not in part.rows:
                    raise ValueError(
                        f"{name}: baseline={baseline} is no row of it; there are "
                        f"{sorted(part.rows)}"
                    )


@dataclass(frozen=True, slots=True)
class Record:
    """A row at one seed."""

    row: str
    seed: int
    epoch: int
    """Chosen on the validation events."""
    validation: dict[str, float]
    """Metrics of that epoch, of the validation run."""
    test: dict[str, float]
    """Metrics of the test run after as many epochs: the result."""
    best_test_epoch: int
    """The rule of many papers: the epoch that is best on the test events."""
    best_test: dict[str, float]
    validation_curve: list[float]
    """choose_by after each scored epoch."""
    test_curve: list[float]
    epochs: list[int]
    """That were scored."""
    config: dict[str, Any]
    """Of the runs: dotted key -> value, what they may differ in left out."""
    log: str
    """Fingerprint of the sequences."""
    commit: str
    device: str
    seconds: dict[str, float]
    """Run -> wall time of its training and scoring."""

    @property
    def file_name(self) -> str:
        """Name of the record's file."""
        return f"{self.row}_seed{self.seed}.json"


def make_records(page: PageConfig, runs: Sequence[str | Path]) -> list[Record]:
    """Return the records of run directories of a sweep (ROW_sSEED_ID), or ROW=DIRECTORY.

    Raises:
        ValueError: if a directory is no finished run of a row, or one of the two runs of a row and
            seed is missing, or they differ in more than what is held out.
    """
    pairs: dict[tuple[str, int], dict[str, Run]] = {}
    for row, run in by_row(page, runs):
        if any(row in study.rows for study in page.studies.values()):
            continue
        held_out, seed = str(run.config.get(HOLD_OUT)), int(run.config["seed"])
        pair = pairs.setdefault((row, seed), {})
        if held_out in pair:
            raise ValueError(
                f"{run.path} and {pair[held_out].path} are both the {held_out} run of {row}, seed "
                f"{seed}: name one"
            )
        pair[held_out] = run
    return [_record(row, seed, pair, page.choose_by) for (row, seed), pair in sorted(pairs.items())]


def by_row(page: PageConfig, runs: Sequence[str | Path]) -> list[tuple[str, Run]]:
    """Return the runs, each with the row that it belongs to.

    Raises:
        ValueError: if a directory is no run of a row.
    """
    rows = {name for part in page.parts.values() for name in part.rows}
    found = []
    for argument in runs:
        run = read_run(argument)
        match = _RUN_NAME.fullmatch(run.path.name)
        row = run.label or (match["row"] if match else run.path.name)
        if row not in rows:
            raise ValueError(
                f"{run.path}: {row} is no row of the page; there are {sorted(rows)}. Name the row: "
                "ROW=DIRECTORY"
            )
        found.append((row, run))
    return found


def _record(row: str, seed: int, pair: Mapping[str, Run], choose_by: str) -> Record:
    missing = {"validation", "test"} - set(pair)
    if missing:
        (there,) = (run.path for run in pair.values())
        raise ValueError(
            f"{row}, seed {seed}: there is no {missing.pop()} run beside {there}. An epoch is "
            "chosen on the validation events and judged on the test events: give both runs"
        )
    curves = {held_out: _epochs(run) for held_out, run in pair.items()}
    configs = {
        held_out: {k: v for k, v in run.config.items() if k not in (*FREE, "seed")}
        for held_out, run in pair.items()
    }
    facts = {held_out: run_facts(run) for held_out, run in pair.items()}
    epochs = sorted(curves["test"])
    differing = [k for k, v in configs["test"].items() if configs["validation"].get(k) != v]
    if facts["test"]["log"] != facts["validation"]["log"]:
        differing.append("the sequences of data.log")
    if epochs != sorted(curves["validation"]):
        differing.append("the epochs that were scored")
    if differing:
        raise ValueError(
            f"{row}, seed {seed}: the validation and the test run differ in "
            f"{', '.join(differing)}, not only in {HOLD_OUT}"
        )
    chosen = max(epochs, key=lambda e: (curves["validation"][e][choose_by], -e))
    best = max(epochs, key=lambda e: (curves["test"][e][choose_by], -e))
    return Record(
        row=row,
        seed=seed,
        epoch=chosen,
        validation=curves["validation"][chosen],
        test=curves["test"][chosen],
        best_test_epoch=best,
        best_test=curves["test"][best],
        validation_curve=[round(curves["validation"][e][choose_by], 5) for e in epochs],
        test_curve=[round(curves["test"][e][choose_by], 5) for e in epochs],
        epochs=epochs,
        config=configs["test"],
        log=facts["test"]["log"],
        commit=run_commit(pair["test"]),
        device=facts["test"]["device"],
        seconds={
            held_out: round(sum(s.get("perf/seconds", 0.0) for s in run.steps), 1)
            for held_out, run in pair.items()
        },
    )


def _epochs(run: Run) -> dict[int, dict[str, float]]:
    if "all" not in run.windows:
        raise ValueError(
            f"{run.path} is not finished: go on with it (resume=true), or leave it out"
        )
    found = {
        int(name.removeprefix("epoch ")): {m: round(row[m], 6) for m in METRICS if m in row}
        for name, row in run.windows.items()
        if name.startswith("epoch ")
    }
    if not found:
        raise ValueError(
            f"{run.path} has no epochs in its evaluation: it was not run with data.window=epoch"
        )
    return found


def run_facts(run: Run) -> dict[str, Any]:
    """Return what the run wrote of its device and its log.

    Raises:
        ValueError: if it wrote nothing.
    """
    path = run.path / FACTS
    if not path.is_file():
        raise ValueError(f"{run.path} has no {FACTS}: it was written by an older version, run anew")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def run_commit(run: Run) -> str:
    """Return the commit of a run, and whether files differed from it."""
    first, _, rest = (run.path / COMMIT).read_text(encoding="utf-8").partition("\n")
    return first if not rest.strip() else f"{first} and changes"


def write_records(records: "Iterable[Record | StudyRecord]", folder: Path) -> None:
    """Write each record as JSON into a folder; one of the same row and seed is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        content = {name: getattr(record, name) for name in type(record).__dataclass_fields__}
        # A line a field: curves and configurations stay short to look at, and differences readable.
        lines = [f"{json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in content.items()]
        write_atomically(folder / record.file_name, "{" + ",\n ".join(lines) + "}\n")


def read_records(folder: Path) -> list[Record]:
    """Return the records of a folder, by row and seed.

    Raises:
        ValueError: if one is no record.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(Record(**json.loads(path.read_text(encoding="utf-8"))))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no record of results: {error}") from error
    return records


def results(
    page: str | Path,
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    again: Sequence[str | Path] = (),
) -> str:
    """Add runs to the records beside a page, and write the page of all records anew.

    Args:
        page: YAML file of PageConfig.
        runs: run directories; none: the page is made of the records that are there.
        output: Markdown file; records and plots go into the folder of its name without suffix.
        again: run directories of rows and seeds that are recorded already, to be held against them.

    Returns:
        What was written.

    Raises:
        ValueError: as `make_records` and `read_records`, or if there are no records.
    """
    from gr.repeats import AGAIN, repeat_section
    from gr.results_page import write_page
    from gr.studies import STUDIES, make_study_records, read_study_records

    config, _ = load_config(PageConfig, page)
    output = Path(output)
    folder = output.with_suffix("")
    new, new_studies = make_records(config, runs), make_study_records(config, runs)
    write_records(new, folder)
    if new_studies:
        write_records(new_studies, folder / STUDIES)
    records, studies = read_records(folder), read_study_records(folder / STUDIES)
    if not records and not studies:
        raise ValueError(f"{folder} holds no records: name run directories of a sweep")
    command = f"gr results {page} RUNS --output {output}"
    repeats = folder / AGAIN
    new_again, new_study_again = make_records(config, again), make_study_records(config, again)
    repeat_section(config, [*records, *studies], [*new_again, *new_study_again])  # or raise
    if again:
        write_records(new_again, repeats)
        write_records(new_study_again, repeats / STUDIES)
    repeated: list[Record | StudyRecord] = [*read_records(repeats)]
    repeated += read_study_records(repeats / STUDIES)
    files = write_page(config, records, output, command=command, studies=studies, repeats=repeated)
    added, total = len(new) + len(new_studies), len(records) + len(studies)
    return f"{added} records added, {total} in all; wrote {', '.join(map(str, files))}"
