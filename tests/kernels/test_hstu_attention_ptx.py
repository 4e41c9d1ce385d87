"""The PTX that the Hopper kernels generate, run on 32 lanes in Python: it needs no GPU."""

import re

import pytest
import torch

pytest.importorskip("triton")

from kernels.hstu_attention._hopper.bias import _column_load, _toeplitz_load
from kernels.hstu_attention._hopper.bias_gradient import _diagonal_sums

LANES = range(32)


def run(ptx, lanes, memory):
    """Run on registers by lane, dicts of name -> number; addresses are bytes, memory is by word."""

    def value(lane, operand):
        if operand == "%laneid":
            return lane
        if operand.startswith("0f"):
            assert operand == "0f00000000"
            return 0.0
        number = re.fullmatch(r"-?\d+", operand)
        return int(operand) if number else lanes[lane][operand]

    for line in ptx.split("\n"):
        line = line.strip("{};")
        if not line or line.startswith(".reg"):
            continue
        operation, rest = line.removeprefix("@leader ").split(" ", 1)
        operands = rest.split(", ")
        address = re.search(r"\[(\S+) \+ (-?\d+)\]", rest)
        if address:
            at = [(registers[address[1]] + int(address[2])) // 4 for registers in lanes]
        if operation.startswith("ld.global.nc"):
            for lane in LANES:
                lanes[lane][operands[0]] = memory[at[lane]]
            continue
        if operation.startswith("red"):
            for lane in LANES:
                if lanes[lane]["leader"]:
                    memory[at[lane]] = memory.get(at[lane], 0.0) + lanes[lane][operands[1]]
            continue
        x = [[value(lane, operand) for operand in operands[1:]] for lane in LANES]
        if operation.startswith("shfl.sync.idx"):
            assert operands[3:] == ["31", "-1"]
            results = [x[source][0] for _, source, *_ in x]
        else:
            results = [OPERATIONS[operation.split(".")[0]](operation, *y) for y in x]
        for lane in LANES:
            lanes[lane][operands[0]] = results[lane]


OPERATIONS = {
    "mov": lambda _, a: a,
    "add": lambda _, a, b: a + b,
    "and": lambda _, a, b: a & b,
    "selp": lambda _, a, b, p: a if p else b,
    "setp": lambda operation, a, b: a < b if ".lt." in operation else a == b,
}


def held(lane, columns):
    """Return (row, column) of each element that a lane holds of (16, columns), in order."""
    r, c = divmod(lane, 4)
    return [
        (r + 8 * i, 8 * g + 2 * c + e)
        for g in range(columns // 8)
        for i in range(2)
        for e in range(2)
    ]


def test_diagonal_sums():
    x = torch.randint(-99, 99, (16, 64), generator=torch.Generator().manual_seed(0)).double()
    lanes = []
    for lane in LANES:
        elements = held(lane, 64)
        registers = {f"${32 + k}": x[at].item() for k, at in enumerate(elements)}
        row, column = elements[0]
        lanes.append({**registers, "$64": 4 * (column - row)})
    sums: dict[int, float] = {}
    run(_diagonal_sums.fn(), lanes, sums)
    expected = {d: x.diagonal(d).sum().item() for d in range(-15, 64)}
    assert {**dict.fromkeys(sums, 0.0), **expected} == sums


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("columns", [64, 128])
def test_toeplitz_load(columns, step):
    table = {d: 1000 + d for d in range(-200, 200)}
    lanes = []
    for lane in LANES:
        row, column = held(lane, columns)[0]
        lanes.append({f"${columns // 2}": 4 * step * (column - row)})
    run(_toeplitz_load.fn(columns, step), lanes, table)
    for lane in LANES:
        for k, (row, column) in enumerate(held(lane, columns)):
            assert lanes[lane][f"${k}"] == table[step * (column - row)]


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("columns", [64, 128])
def test_column_load(columns, step):
    numbers = {step * c: 7 * c for c in range(columns)}
    lanes = [{f"${columns // 4}": 4 * step * held(lane, columns)[0][1]} for lane in LANES]
    run(_column_load.fn(columns, step)[0], lanes, numbers)
    for lane in LANES:
        wanted = [c for row, c in held(lane, columns) if row < 8]
        assert [lanes[lane][f"${k}"] for k in range(columns // 4)] == [7 * c for c in wanted]
