import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gr import cli, versions
from gr.config import TrainConfig
from gr.config_io import load_config

ROOT = Path(__file__).parents[2]
RUN = """
data: {log: absent, num_items: 9, num_negatives: 2}
embeddings:
  tables:
    item: {num_embeddings: 10, dim: 8, features: [item_id, target_item_id, negative_item_id]}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    # The command is tested here; what it finds installed, in test_versions.py.
    monkeypatch.setattr(cli, "check_versions", lambda: None)
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\n{RUN}")
    return str(path)


@pytest.fixture
def fails(capsys):
    """Run a command that must fail as a user's mistake; return its message."""

    def fails(*argv):
        assert cli.main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        return err

    return fails


def test_overrides_stand_anywhere(config, capsys):
    argv = ["train", config, "seed=3", "--print-config", "model.dim=32"]
    assert cli.main(argv) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.seed, printed.model.dim, printed.data.num_items) == (3, 32, 9)


def test_train_hands_over_configuration_and_overrides(config, monkeypatch):
    calls = []
    monkeypatch.setattr("gr.train.train", lambda *args: calls.append(args))
    assert cli.main(["train", config, "seed=3"]) == 0
    ((got, resolved, overrides),) = calls
    assert got.seed == resolved.seed == 3
    assert overrides == ["seed=3"]


def test_sessionize_hands_over_its_configuration(config, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("pipelines.sessionize.sessionize", calls.append)
    (tmp_path / "log.yaml").write_text("input: a\noutput: b\nactions: [click]")
    assert cli.main(["sessionize", "log.yaml", "partitions=7"]) == 0
    assert (calls[0].input, calls[0].actions, calls[0].partitions) == ("a", ("click",), 7)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["modle.dim=3"], "Did you mean model?"),
        (["model.dim=wide"], "expected an integer, found 'wide'"),
        (["model.dim"], "expected key=value"),
        (["embeddings.tables.item.dim=6"], "embeddings.tables.item"),
        ([], "absent"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(config, tmp_path, fails, overrides, expected):
    before = sorted(tmp_path.rglob("*"))
    assert expected in fails("train", config, *overrides)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_required_key_is_asked_for(config, tmp_path, fails):
    (tmp_path / "run.yaml").write_text(RUN)
    assert "required key(s) not set: run_dir" in fails("train", config)


def test_a_run_directory_in_use_is_refused_and_left_alone(config, tmp_path, monkeypatch, fails):
    from gr.runlog import open_run_dir

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")

    def train(config, resolved, overrides):
        open_run_dir(config.run_dir, resume=config.resume, resolved=resolved)

    monkeypatch.setattr("gr.train.train", train)
    assert "is not empty" in fails("train", config)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes"]


def test_missing_files(config, fails):
    assert "absent.yaml: no such file" in fails("train", "absent.yaml")
    assert "absent.yaml: no such file" in fails("sessionize", "absent.yaml")
    assert "absent is not a run directory" in fails("report", "absent")
    assert "found none" in fails("checkpoint", "inspect", "absent")


def test_only_rank_0_speaks_before_the_run(config, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", config, "modle.dim=3"])
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_a_rank_that_fails_alone_says_which_it_is(config, monkeypatch, fails):
    monkeypatch.setenv("RANK", "3")

    # Raised by code of ours, as a reader of a partition would.
    monkeypatch.setattr("gr.train.train", lambda *args: load_config(TrainConfig, "bad.yaml"))
    assert fails("train", config).startswith("[rank 3] gr train: error: bad.yaml: no such file")


def test_a_mismatched_set_is_one_message(config, monkeypatch, fails):
    def find(package):
        return {"torch": "9.9.9"}.get(package, "0")

    monkeypatch.setattr(cli, "check_versions", lambda: versions.check_versions(find))
    assert "both fbgemm-gpu" in fails("train", config)


def test_errors_inside_libraries_keep_their_traceback(config, monkeypatch):
    monkeypatch.setattr("gr.train.train", lambda *args: json_error())
    with pytest.raises(ValueError, match="Expecting value"):
        cli.main(["train", config])
    monkeypatch.setattr("gr.train.train", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", config])


def json_error():
    import json

    json.loads("x")


def test_a_traceback_on_request(config):
    with pytest.raises(ValueError, match="modle"):
        cli.main(["train", config, "modle.dim=3", "--traceback"])


def test_ctrl_c(config, monkeypatch, capsys):
    def train(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("gr.train.train", train)
    assert cli.main(["train", config]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("argv", [[], ["tarin"], ["train"], ["report", "--wrong", "x"]])
def test_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: gr" in capsys.readouterr().err


def test_a_checkout_that_is_not_installed_runs(config, monkeypatch, capsys):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cli.metadata, "version", missing)
    assert cli.main(["train", config, "--print-config"]) == 0
    assert "run_dir" in capsys.readouterr().out


def test_the_module_is_the_command(config):
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | {"PYTHONPATH": str(ROOT)}

    def run(*argv):
        command = [sys.executable, "-m", "gr", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = run("report", "absent")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("gr report: error: absent is not a run directory")
    assert run("--version").stdout.startswith("gr ")
