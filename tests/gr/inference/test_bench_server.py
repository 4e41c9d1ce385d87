"""The bench of the server, on a server that is not gr's: what it counts is what it was sent."""

import asyncio
import json
import threading
from itertools import cycle

import pytest

from gr.inference.bench_server import bodies, drive, users_and_items
from tests.e2e.toy import NUM_ITEMS

pytestmark = pytest.mark.xdist_group("serve")


def serve_until(stop, started, seen):
    async def answer(reader, writer):
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            seen.append(body)
            status = b"200 OK" if body["user_id"] % 2 else b"429 Too Many Requests"
            writer.write(b"HTTP/1.1 %s\r\ncontent-length: 2\r\n\r\n{}" % status)

    async def main():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        started.append(server.sockets[0].getsockname())
        while not stop.is_set():
            await asyncio.sleep(0.01)

    asyncio.run(main())


def test_it_counts_answers_and_refusals():
    stop, started, seen = threading.Event(), [], []
    thread = threading.Thread(target=serve_until, args=(stop, started, seen))
    thread.start()
    while not started:
        pass
    requests = cycle(json.dumps({"user_id": n}).encode() for n in (1, 2, 3))
    load = drive(started[0], requests, 3, 0.2)
    stop.set()
    thread.join()
    assert set(load.statuses) == {200, 429}
    assert load.statuses.total() == len(seen)
    assert len(load.seconds) == load.statuses[200]
    assert all(0 < x < 0.3 for x in load.seconds)


def test_requests_name_users_and_items_of_the_log(served_run):
    users, items, end = users_and_items(str(served_run))
    assert users == list(range(24))
    assert items == list(range(NUM_ITEMS))
    scored = json.loads(next(bodies(users, items, end, candidates=5)))
    assert len(set(scored["candidates"])) == 5
    assert scored["time"] == end > 1_700_006_400
    found = json.loads(next(bodies(users, items, end, retrieve=7)))
    assert (found["retrieve"], found["top"]) == (7, 10)
