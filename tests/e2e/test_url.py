"""A run whose log lies in a store."""

import fsspec

from tests.e2e.test_train import assert_equal_runs
from tests.e2e.toy import run, write_config, write_log


def test_a_run_by_url_is_the_run_by_path(tmp_path):
    log = write_log(tmp_path, users=12, days=2)
    store = fsspec.filesystem("memory")
    store.put(str(log), "/gr-test-url/log", recursive=True)
    try:
        runs = []
        for name, place in (("path", log), ("url", "memory://gr-test-url/log")):
            folder = tmp_path / name
            folder.mkdir()
            runs.append(run(write_config(folder, place)))
    finally:
        store.rm("/gr-test-url", recursive=True)
    assert_equal_runs(*runs)
