"""`gr serve` as a process: from the command to answers, and to a stop that loses none."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.gr.inference.served import toy_run

pytest.importorskip("fastapi")
ROOT = Path(__file__).parents[2]
BODY = {"user_id": 3, "time": 1_700_600_000, "candidates": [1, 2, 3]}


def post(address, body):
    request = urllib.request.Request(
        f"{address}/recommend", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def server(tmp_path):
    run_dir = toy_run(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "gr", "serve", str(run_dir), "--port", "0", "--window-ms", "20"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    line = ""
    while "http://" not in line:
        line = process.stderr.readline()
        assert line, "ended before it served"
    yield process, re.search(r"http://\S+:\d+", line)[0]
    process.kill()
    process.wait()


@pytest.mark.slow
def test_it_serves_until_it_is_asked_to_stop_and_answers_what_waits(server):
    process, address = server
    status, found = post(address, BODY)
    assert status == 200
    assert len(found["items"]) == 3
    assert post(address, BODY | {"user_id": 99})[0] == 404
    answers, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                answers.append(post(address, BODY)[0])
            except OSError:  # it listens no more
                return

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    stop.set()
    for thread in threads:
        thread.join()
    assert len(answers) > 20
    assert set(answers) <= {200, 503}
    assert answers.count(200) > 20
