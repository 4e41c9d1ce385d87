import pytest

from tests.gr.inference.served import toy_recommender, toy_run


@pytest.fixture(scope="session")
def served_run(tmp_path_factory):
    """The directory of a trained run; of the tests of xdist group `serve`."""
    return toy_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def served(served_run):
    """What answers with its checkpoint, and must not be changed."""
    return toy_recommender(served_run)
