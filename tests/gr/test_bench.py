import json
import types

import pytest
import torch

from gr import bench
from kernels.bench import Case, timed


@pytest.fixture
def operator(monkeypatch):
    """An operator `square` whose rival takes far longer."""

    def variants(case, mode, device):
        x = torch.randn(case.shape["L"], device=device)
        slow = torch.randn(64, 64, device=device)
        return {"ours": lambda: x * x, "rival": lambda: [slow @ slow for _ in range(20)]}

    module = types.SimpleNamespace(
        CASES=[
            Case("small", torch.float32, {"L": 64}, ("forward",)),
            Case("other", torch.float32, {"L": 32}, ("forward",)),
        ],
        variants=variants,
        bytes_moved=lambda case, mode: 8 * case.shape["L"],
        flops=lambda case, mode: case.shape["L"],
    )
    monkeypatch.setattr(bench, "operators", lambda: ["square"])
    monkeypatch.setattr(bench.importlib, "import_module", _importer(module))
    return module


def _importer(module):
    real = bench.importlib.import_module
    return lambda name: module if name == "kernels.square.bench" else real(name)


def test_measures_every_variant(operator):
    case = operator.CASES[0]
    calls = {
        **operator.variants(case, "forward", "cpu"),
        **bench.copy_of(operator, case, "forward", "cpu"),
    }
    times = bench.measure(calls, device="cpu", rounds=2, seconds=0.001)
    assert set(times) == {"ours", "rival", bench.COPY}
    assert all(len(found) >= 10 and min(found) > 0 for found in times.values())
    record = bench.summarize("square", operator, case, "forward", times, "cpu", "abc", "cmd")
    assert record.ms_p20 <= record.ms_p50 <= record.ms_p80
    assert record.baseline_ms["rival"] > record.ms_p50
    assert record.gb_per_s == pytest.approx(8 * 64 / record.ms_p50 / 1e6, rel=0.01, abs=0.06)


def test_variants_are_interleaved():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    bench.measure(calls, device="cpu", rounds=2, seconds=0)
    first = order.index("b")
    timed_part = "".join(order[2 * first :])
    assert timed_part == "a" * 5 + "b" * 10 + "a" * 5


def test_only_chosen_cases_and_no_record(operator, capsys, tmp_path):
    records = tmp_path / "records.jsonl"
    argv = ["square", "--no-record", "--case", "small", "--seconds", "0", "--records", str(records)]
    assert bench.main(argv) == 0
    out = capsys.readouterr().out
    assert "small" in out
    assert "other" not in out
    assert "rival" in out
    assert not records.exists()


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A project without tests, which pytest runs without workers of its own."""
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    tests = tmp_path / "tests" / "kernels"
    tests.mkdir(parents=True)
    return tests


def test_refuses_to_record_on_red(operator, alone, monkeypatch, tmp_path):
    records = tmp_path / "records.jsonl"
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    argv = ["square", "--records", str(records)]
    with pytest.raises(ValueError, match="found none"):
        bench.main(argv)
    (alone / "test_square.py").write_text("def test_red():\n    assert False\n")
    with pytest.raises(ValueError, match="tests of square fail"):
        bench.main(argv)
    assert not records.exists()


def test_knows_which_operators_are_red(alone):
    (alone / "test_square.py").write_text("def test_red():\n    assert False\n")
    (alone / "test_root.py").write_text("def test_green():\n    pass\n")
    (alone / "test_cube.py").write_text("import nothing_of_this_name\n")
    assert bench.red_operators(["root", "square", "cube"]) == ["square", "cube"]
    assert bench.red_operators(["root"]) == []


def test_records_one_line_a_case(operator, monkeypatch, tmp_path):
    records = tmp_path / "records.jsonl"
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.torch.cuda, "get_device_name", lambda: "card")
    monkeypatch.setattr(bench, "driver", lambda: "1.2")
    monkeypatch.setattr(bench, "red_operators", lambda names: [])
    monkeypatch.setattr(bench, "_time_cuda", bench._time_cpu)
    monkeypatch.setattr(bench, "matmul_tflops", lambda dtype, device: 100.0)
    variants = operator.variants
    operator.variants = lambda case, mode, device: variants(case, mode, "cpu")
    copy = bench.copy_of
    monkeypatch.setattr(bench, "copy_of", lambda b, case, mode, device: copy(b, case, mode, "cpu"))
    bench.main(["square", "--seconds", "0", "--records", str(records)])
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [line["case"] for line in lines] == ["small", "other"]
    assert lines[0]["gpu"] == "card"
    assert lines[0]["driver"] == "1.2"
    assert lines[0]["dtype"] == "float32"
    assert set(lines[0]["baseline_ms"]) == {"rival", bench.COPY}
    assert lines[0]["command"].startswith("gr bench square")


def test_user_errors(monkeypatch):
    with pytest.raises(ValueError, match="expected an operator of"):
        bench.main(["no_such_operator", "--no-record"])
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--no-record"):
        bench.main(["layer_norm"])


def test_timed_backward_computes_every_gradient():
    seen = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, dout):
            seen.append(ctx.needs_input_grad)
            a, b = ctx.saved_tensors
            return dout * b, dout * a

    call = timed(Product.apply, (torch.randn(3), torch.randn(3)), "backward")
    call()
    da, db = call()
    assert seen == [(True, True)] * 2
    assert da.shape == db.shape == (3,)


@pytest.mark.parametrize("name", bench.operators())
def test_every_operator_bench_runs_small(name):
    module = bench.load(name)
    for case in module.CASES:
        small = case._replace(shape={key: min(n, 40) for key, n in case.shape.items()})
        for mode in small.modes:
            assert module.bytes_moved(case, mode) > 0
            assert module.flops(case, mode) >= 0
            variants = module.variants(small, mode, "cpu")
            assert next(iter(variants)) == "ours"
            for call in variants.values():
                call()
