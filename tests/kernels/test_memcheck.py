import pytest

from gr.bench import ROOT
from tests.kernels.memcheck import CHECKS


def test_memcheck_has_a_case_of_every_operator():
    operators = {path.parent.name for path in (ROOT / "kernels").glob("*/op.py")}
    assert set(CHECKS) == operators


@pytest.mark.parametrize("name", CHECKS)
def test_the_cases_run(name, device):
    CHECKS[name](device)
