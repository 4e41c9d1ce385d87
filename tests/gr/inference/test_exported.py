"""Parts of an exported model that need no export."""

import numpy as np
import pytest
import torch

from gr import cli
from gr.exported import ExportedModel, ExportedTable, dequantize_int8
from gr.trainer import Trainer
from tests.gr.inference.served import toy_recommender, toy_run

pytestmark = pytest.mark.xdist_group("serve")


def test_eight_bits_are_fbgemms():
    import fbgemm_gpu  # noqa: F401

    x = torch.randn(30, 24)
    packed = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(x)
    wanted = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(packed)
    torch.testing.assert_close(dequantize_int8(packed), wanted, rtol=1e-6, atol=1e-6)


def test_dynamic_ids_have_their_rows():
    known = np.array([-7, 3, 2**60])
    table = ExportedTable("fp32", torch.eye(4), "dynamic", known, np.array([2, 3, 1]))
    rows = table.rows_of(np.array([3, 2**60, -7, -1, 5]), "item_id")
    assert rows.tolist() == [3, 1, 2, 0, 0]
    empty = ExportedTable("fp32", torch.eye(4), "dynamic", known[:0], known[:0])
    assert empty.rows_of(np.array([3]), "item_id").tolist() == [0]


def test_what_is_not_exported_is_refused(served_run, tmp_path, capsys):
    argv = ["export", str(served_run), str(tmp_path / "out"), "model.hstu.semi_local.window=4"]
    assert cli.main(argv) == 2
    assert "does not write models with model.hstu.semi_local" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_in_fp8_of_which_a_layer_overflowed(tmp_path, monkeypatch, capsys):
    """It is served as it was trained, and exported in bf16."""
    built = Trainer.__init__

    def with_a_layer_in_bf16(trainer, *arguments, **options):
        built(trainer, *arguments, **options)
        trainer.guard.load_state(["encoder.layers.1"])

    monkeypatch.setattr(Trainer, "__init__", with_a_layer_in_bf16)
    run_dir = toy_run(tmp_path, "precision=bf16", "model.hstu.precision=fp8")
    monkeypatch.undo()
    (stack,) = toy_recommender(run_dir).scorer.stacks
    assert [fp8 is not None for _, fp8 in stack._weights] == [True, False]
    out = str(tmp_path / "out")
    assert cli.main(["export", str(run_dir), out]) == 2
    assert "model.hstu.precision=fp8" in capsys.readouterr().err
    in_bf16 = ["model.hstu.precision=bf16", "precision=fp32"]
    assert cli.main(["export", str(run_dir), out, *in_bf16]) == 0
    assert "largest difference" in capsys.readouterr().out


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no exported model"):
        ExportedModel(tmp_path)
