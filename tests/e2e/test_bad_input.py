"""What a user can get wrong about a run: one message, exit status 2, nothing half-written."""

import pyarrow.parquet as pq
import pytest

from gr import cli
from tests.e2e.toy import run, write_events


@pytest.fixture
def fails(capsys):
    """Run a command that must fail; return its message."""

    def call(*argv: str, status: int = 2) -> str:
        assert cli.main([str(a) for a in argv]) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        return err.splitlines()[-1]

    return call


def test_no_log(config, tmp_path, fails):
    message = fails("train", config, f"data.log={tmp_path / 'absent'}")
    assert "no session-end log" in message
    assert "gr sessionize" in message
    assert not (tmp_path / "run").exists()


def test_an_empty_log(tmp_path, fails):
    write_events(tmp_path / "events.parquet", users=0)
    (tmp_path / "log.yaml").write_text(
        f"input: {tmp_path}/events.parquet\noutput: {tmp_path}/log\nactions: [click]\n"
    )
    table = pq.read_table(write_log_events(tmp_path)).slice(0, 0)
    pq.write_table(table, tmp_path / "events.parquet")
    assert "events.parquet" in fails("sessionize", tmp_path / "log.yaml")
    assert not (tmp_path / "log").exists()


def write_log_events(folder):
    write_events(folder / "some.parquet", users=2)
    return folder / "some.parquet"


def test_a_column_that_the_log_lacks(config, tmp_path, fails):
    message = fails("train", config, "data.item_features.price.column=prize")
    assert "prize" in message
    assert "part-00000.parquet" in message
    assert not (tmp_path / "run").exists()


def test_an_id_outside_its_table(config, fails):
    message = fails("train", config, "embeddings.tables.item.num_embeddings=20")
    for part in ("'item'", "item_id", "expected ids in 0 .. 18", "partition", "hashed"):
        assert part in message


def test_a_run_directory_that_is_not_empty(config, tmp_path, fails):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "resume=true" in fails("train", config)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_checkpoint_of_another_model(config, tmp_path, fails):
    run(config, "max_steps=2")
    before = (tmp_path / "run" / "config.yaml").read_text()
    message = fails("train", config, "resume=true", "model.dim=32")
    assert "model.dim: 16 then, 32 now" in message
    # Even where the stored configuration was edited to agree, the checkpoint does not.
    (tmp_path / "run" / "config.yaml").write_text(
        before.replace("num_heads: 2\n    qk_dim: 8", "num_heads: 1\n    qk_dim: 8")
    )
    edited = (tmp_path / "run" / "config.yaml").read_text()
    assert edited != before
    message = fails("train", config, "resume=true", "model.hstu.num_heads=1")
    assert "checkpoint of another model" in message


def test_a_loss_that_is_not_finite(config, tmp_path, fails):
    assert "is not finite at step" in fails("train", config, "optim.lr=1e30", status=1)
