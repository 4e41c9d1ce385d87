import gc
import os

import pytest
import torch
from hypothesis import settings

# CI draws the same examples every time, so that a red run is the change's fault; elsewhere each run
# draws new ones.
settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path, config):
    """Leave out, unread, what has no test for the interpreter where only such tests are wanted."""
    is_tests = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if config.option.markexpr.startswith("interpret") and is_tests:
        return True if "interpret" not in collection_path.read_text("utf-8") else None
    return None


def pytest_collection_modifyitems(items):
    num_gpus = torch.cuda.device_count()
    for item in items:
        if "gpu" in item.keywords and num_gpus == 0:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        for marker in item.iter_markers("multi_gpu"):
            needed = marker.args[0] if marker.args else 2
            if num_gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs"))
        if "interpret" in item.keywords and num_gpus == 0 and not INTERPRET:
            item.add_marker(pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1"))


def pytest_collection_finish():
    # Modules and tests, millions of objects, stay: each full collection would visit them again.
    gc.collect()
    gc.freeze()


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRET or not torch.cuda.is_available() else "cuda"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    # Several processes test on one GPU: what a large test held goes back at once.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
