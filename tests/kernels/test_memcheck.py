import pytest

from gr.bench import ROOT
from tests.kernels.memcheck import CHECKS


def test_every_operator_has_a_check():
    operators = {path.parent.name for path in (ROOT / "kernels").glob("*/op.py")}
    of = {check: [op for op in operators if f"{check}_".startswith(f"{op}_")] for check in CHECKS}
    assert all(of.values())
    assert {op for found in of.values() for op in found} == operators


@pytest.mark.parametrize("name", CHECKS)
def test_the_cases_run(name, device):
    CHECKS[name](device)
