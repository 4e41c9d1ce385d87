import io
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gr.runlog import RunDir, RunLog, cut_after, describe_commit, open_run_dir, read_lines


def config(**changes):
    plain = {
        "run_dir": "x",
        "resume": False,
        "seed": 0,
        "max_steps": 0,
        "checkpoint": {"keep": 2},
        "model": {"dim": 8, "layers": [1, 2]},
        "tables": {},
    }
    return OmegaConf.create(plain | changes)


def test_a_new_run_directory_holds_config_overrides_and_commit(tmp_path):
    run = open_run_dir(tmp_path / "a" / "b", resume=False, resolved=config(), overrides=["seed=0"])
    assert OmegaConf.load(run.path / "config.yaml") == config()
    assert (run.path / "overrides.txt").read_text() == "seed=0\n"
    assert (run.path / "commit.txt").read_text()
    assert {p.name for p in run.path.iterdir()} == {
        *("config.yaml", "overrides.txt", "commit.txt", "facts.json"),
    }


def test_a_directory_in_use_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty \(notes\.txt\).*resume=true"):
        open_run_dir(tmp_path, resume=False, resolved=config())
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        open_run_dir(tmp_path, resume=True, resolved=config())
    with pytest.raises(ValueError, match="is a file"):
        open_run_dir(tmp_path / "notes.txt", resume=False, resolved=config())
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_resume_of_nothing_starts_a_run(tmp_path):
    run = open_run_dir(tmp_path / "a", resume=True, resolved=config())
    assert (run.path / "config.yaml").is_file()
    # A kill while the first file was written leaves a draft only.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".config.yaml.tmp").write_text("half")
    open_run_dir(tmp_path / "b", resume=False, resolved=config())


def test_a_job_goes_on_with_the_run_that_it_began_and_with_no_other(tmp_path):
    def begin(job, folder="run", resume=False):
        return open_run_dir(tmp_path / folder, resume=resume, resolved=config(), job=job)

    begin("17")
    assert (tmp_path / "run" / "job.txt").read_text() == "17\n"
    begin("17")
    for other in ("18", "1", ""):
        with pytest.raises(ValueError, match=r"not empty .*resume=true"):
            begin(other)
    # Taken up by hand, the run belongs to the job that took it up.
    begin("18", resume=True)
    begin("18")
    with pytest.raises(ValueError, match="not empty"):
        begin("17")
    # Refused the first time, a job is refused when it is restarted too.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(ValueError, match="not empty"):
            begin("18", "other")
    # Killed before config.yaml was there, it had begun nothing.
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "job.txt").write_text("18\n")
    begin("19", "early")
    assert (tmp_path / "early" / "job.txt").read_text() == "19\n"


def test_resume_takes_new_limits_and_records_them(tmp_path):
    open_run_dir(tmp_path, resume=False, resolved=config(), overrides=["a=1"])
    new = config(resume=True, max_steps=9, checkpoint={"keep": 5})
    open_run_dir(tmp_path, resume=True, resolved=new, overrides=["max_steps=9"])
    assert OmegaConf.load(tmp_path / "config.yaml") == new
    assert (tmp_path / "overrides.txt").read_text() == "a=1\n# resumed\nmax_steps=9\n"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"model": {"dim": 9, "layers": [1, 2]}}, "model.dim: 8 then, 9 now"),
        ({"model": {"dim": 8, "layers": [1]}}, "model.layers"),
        ({"model": {"dim": 8, "layers": [1, 2], "new": 3}}, "model.new: not set then, 3 now"),
        ({"tables": {"item": {"dim": 3}}}, "tables.item.dim"),
    ],
)
def test_resume_refuses_another_configuration(tmp_path, changes, named):
    open_run_dir(tmp_path, resume=False, resolved=config())
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match="cannot resume") as caught:
        open_run_dir(tmp_path, resume=True, resolved=config(resume=True, **changes))
    assert named in str(caught.value)
    assert "run_dir: " not in str(caught.value)
    assert (tmp_path / "config.yaml").read_text() == before


def test_commit_names_the_change(tmp_path):
    import subprocess

    assert "not in a git checkout" in describe_commit(tmp_path)
    (tmp_path / "COMMIT").write_text("c0ffee\n")
    assert describe_commit(tmp_path) == "c0ffee\n"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a.txt").write_text("one\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert describe_commit(tmp_path) == f"{head}\n"
    (tmp_path / "a.txt").write_text("two\n")
    (tmp_path / "b.txt").write_text("new\n")
    text = describe_commit(tmp_path)
    assert text.startswith(head)
    assert "-one\n+two" in text
    assert "?? b.txt" in text


@pytest.fixture
def run(tmp_path):
    return open_run_dir(tmp_path / "run", resume=False, resolved=config())


def write_run(run, steps, restored=0):
    log = RunLog(run, restored_step=restored, console=io.StringIO())
    for step in steps:
        log.metrics(step, {"train/loss": 1 / step, "perf/examples_per_s": 3.0})
        if step % 3 == 0:
            log.evaluation(step, f"day-{step}", {"ne-click": step / 7, "hr@10": None})
    log.close()


def test_rows_are_what_was_given_at_full_precision(run):
    write_run(run, range(1, 8))
    assert read_lines(run.path / "metrics.jsonl") == [
        {"step": s, "train/loss": 1 / s, "perf/examples_per_s": 3.0} for s in range(1, 8)
    ]
    assert read_lines(run.path / "eval.jsonl") == [
        {"window": f"day-{s}", "step": s, "ne-click": s / 7, "hr@10": None} for s in (3, 6)
    ]


def test_a_row_is_in_the_file_at_once_and_nan_is_null(run):
    log = RunLog(run, console=io.StringIO())
    log.metrics(1, {"train/loss": math.nan, "grad_norm": math.inf, "examples": 5})
    line = (run.path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "train/loss": null, "grad_norm": null, "examples": 5}\n'
    log.sync()
    log.close()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 12), st.integers(0, 60))
def test_resume_gives_the_bytes_of_an_uninterrupted_run(tmp_path_factory, restored, torn):
    whole = RunDir(tmp_path_factory.mktemp("whole"))
    write_run(whole, range(1, 13))
    killed = RunDir(tmp_path_factory.mktemp("killed"))
    write_run(killed, range(1, 13))
    # The kill cut a line short that was being written after the checkpoint.
    for name in ("metrics.jsonl", "eval.jsonl"):
        with (killed.path / name).open("a") as file:
            file.write('{"step": 13, "train/loss": 0.07692307692307693, "perf/exa'[:torn])
    write_run(killed, range(restored + 1, 13), restored=restored)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (killed.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_damaged_line_is_named(run):
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        cut_after(run, 1)
    (run.path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1"):
        cut_after(run, 1)


def test_tensorboard_holds_the_same_numbers(run):
    write_run(run, range(1, 5))
    board = EventAccumulator(str(run.path)).Reload()
    found = [(e.step, e.value) for e in board.Scalars("train/loss")]
    assert found == [(s, pytest.approx(1 / s, rel=1e-6)) for s in range(1, 5)]
    assert board.Scalars("window/ne-click")[0].value == pytest.approx(3 / 7, rel=1e-6)
    assert "window/hr_at_10" not in board.Tags()["scalars"]  # None is no number


def test_tensorboard_forgets_what_a_resumed_run_does_again(run):
    write_run(run, range(1, 6))
    write_run(run, range(3, 5), restored=2)
    board = EventAccumulator(str(run.path)).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == [1, 2, 3, 4]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_other_consoles_get_lines(run):
    bar, lines = Terminal(), io.StringIO()
    for console in (bar, lines):
        log = RunLog(run, total=10, unit="example", console=console)
        log.advance(4)
        log.metrics(2, {"train/loss": 0.25})
        log.message("hello")
        log.close()
    assert "4/10" in bar.getvalue()
    assert "loss 0.25" in bar.getvalue()
    assert lines.getvalue() == "step 2  train/loss 0.25\nhello\n"


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(None)
    log.advance()
    log.metrics(1, {"a": 1})
    log.evaluation(1, "all", {"a": 1})
    log.message("x")
    log.sync()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_json_lines_are_plain_json(run):
    write_run(run, [1, 2])
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] in (1, 2)
