"""Parts of an exported model that need no export."""

import numpy as np
import pytest
import torch

from gr import cli
from gr.exported import ExportedModel, ExportedTable, dequantize_int8

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


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no exported model"):
        ExportedModel(tmp_path)
