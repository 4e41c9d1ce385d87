import json

from gr.rejects import RejectFile, cut_rejects
from pipelines.rejects import Reject


def reject(row):
    return Reject(
        partition=2, file="part-00002.parquet", row=row, user_id=7, session_id=-1, reason="x"
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_was_skipped_where_and_why(tmp_path):
    folder = tmp_path / "rejects"
    file = RejectFile(folder, 3)
    assert not folder.exists()
    file.write(reject(5), 1)
    RejectFile(folder, 3).write(reject(6), 2)
    assert [p.name for p in folder.iterdir()] == ["rank_3.jsonl"]
    expected = {
        "partition": 2,
        "file": "part-00002.parquet",
        "user_id": 7,
        "session_id": -1,
        "reason": "x",
        "num_sessions": 1,
        "detail": "",
    }
    assert lines(folder / "rank_3.jsonl") == [
        {"step": 1, "row": 5, **expected},
        {"step": 2, "row": 6, **expected},
    ]


def test_a_resumed_run_forgets_what_came_after(tmp_path):
    folder = tmp_path / "rejects"
    for rank, steps in ((0, (1, 4, 5)), (1, (6,)), (2, (2, 4))):
        for step in steps:
            RejectFile(folder, rank).write(reject(10 * step), step)
    with (folder / "rank_2.jsonl").open("a") as file:
        file.write('{"step": 3, "row"')  # a kill cut it short
    cut_rejects(folder, 4)
    kept = {p.name: [(r["step"], r["row"]) for r in lines(p)] for p in folder.iterdir()}
    assert kept == {
        "rank_0.jsonl": [(1, 10), (4, 40)],
        "rank_1.jsonl": [],
        "rank_2.jsonl": [(2, 20), (4, 40)],
    }
    cut_rejects(tmp_path / "absent", 0)
