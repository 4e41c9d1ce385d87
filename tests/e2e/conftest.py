import pytest

from tests.e2e.toy import write_config, write_log


@pytest.fixture(scope="session")
def log(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def config(tmp_path, log):
    return write_config(tmp_path, log)
