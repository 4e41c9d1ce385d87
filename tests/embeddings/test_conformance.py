"""One suite for every form of the tables: the same run, the same rows, to fp32 rounding."""

from dataclasses import replace

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.collection import build_tables
from embeddings.config import EmbeddingsConfig, TableConfig
from embeddings.initial import initial_rows
from tests.dist import run_distributed
from tests.embeddings.scenario import (
    DECAY,
    SEED,
    TABLES,
    Case,
    catalogue,
    oracle_tables,
    rank_batch,
    train,
)

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("conformance")

SAVED = 17
TOLERANCE = {"rtol": 0, "atol": 1e-6}

REPLICATED = Case("replicated", "adamw")
BY_ROW = Case("sharded", "adagrad", ("row_wise",))
BY_TABLE = Case("sharded", "adagrad", ("table_wise",))
CUDA_BY_ROW = Case("sharded", "adamw", ("row_wise",), "cuda")
CUDA_BY_TABLE = Case("sharded", "adamw", ("table_wise",), "cuda")
CUDA_FIXED_ORDER = Case("sharded", "adamw", ("row_wise",), "cuda", deterministic=True)
CUDA_HOST = Case("sharded", "adamw", ("row_wise",), "cuda", momentum="host", ahead=True)
CUDA_CACHED = Case("sharded", "adamw", ("table_wise",), "cuda", cached=True)
CUDA_CACHED_AHEAD = replace(CUDA_CACHED, ahead=True)
CUDA_DEDUP = Case("sharded", "adamw", ("row_wise",), "cuda", index_dedup="on", ahead=True)
CUDA_ALL = replace(CUDA_CACHED, momentum="host", index_dedup="on", sharding=("row_wise",))
BY_ROW_AHEAD = replace(BY_ROW, ahead=True, index_dedup="on")
FORMS = [
    pytest.param((REPLICATED, 1), id="replicated-1"),
    pytest.param((REPLICATED, 2), id="replicated-2", marks=pytest.mark.slow),
    pytest.param((BY_ROW, 1), id="row_wise-1", marks=pytest.mark.slow),
    pytest.param((BY_ROW_AHEAD, 2), id="row_wise-2"),
    pytest.param((BY_TABLE, 2), id="table_wise-2"),
    pytest.param((CUDA_BY_ROW, 1), id="cuda-row_wise-1", marks=pytest.mark.gpu),
    pytest.param((CUDA_BY_TABLE, 1), id="cuda-table_wise-1", marks=pytest.mark.gpu),
    pytest.param((CUDA_HOST, 1), id="cuda-host-1", marks=pytest.mark.gpu),
    pytest.param((CUDA_CACHED, 1), id="cuda-cached-1", marks=pytest.mark.gpu),
    pytest.param((CUDA_CACHED_AHEAD, 1), id="cuda-cached_ahead-1", marks=pytest.mark.gpu),
    pytest.param((CUDA_DEDUP, 1), id="cuda-dedup-1", marks=pytest.mark.gpu),
    pytest.param((CUDA_ALL, 2), id="cuda-all-2", marks=pytest.mark.multi_gpu),
    pytest.param((CUDA_BY_ROW, 2), id="cuda-row_wise-2", marks=pytest.mark.multi_gpu),
    pytest.param((CUDA_BY_TABLE, 2), id="cuda-table_wise-2", marks=pytest.mark.multi_gpu),
    pytest.param((CUDA_FIXED_ORDER, 2), id="cuda-fixed_order-2", marks=pytest.mark.multi_gpu),
    pytest.param((CUDA_ALL, 4), id="cuda-all-4", marks=pytest.mark.multi_gpu(4)),
]
# What a checkpoint of a form is loaded by: fewer ranks, another plan, another form.
HEIRS = {
    (REPLICATED, 1): [(REPLICATED, 2)],
    (REPLICATED, 2): [(REPLICATED, 1)],
    (BY_ROW, 1): [(BY_TABLE, 2)],
    (BY_ROW_AHEAD, 2): [(BY_ROW, 1), (BY_TABLE, 2), (Case("replicated", "adagrad"), 1)],
    (BY_TABLE, 2): [(BY_ROW, 2), (BY_TABLE, 1)],
    (CUDA_BY_ROW, 1): [(CUDA_BY_TABLE, 1), (REPLICATED, 1)],
    (CUDA_BY_TABLE, 1): [(CUDA_BY_ROW, 1)],
    (CUDA_HOST, 1): [(CUDA_BY_ROW, 1), (CUDA_CACHED, 1)],
    (CUDA_CACHED, 1): [(CUDA_HOST, 1)],
    (CUDA_CACHED_AHEAD, 1): [(REPLICATED, 1)],
    (CUDA_DEDUP, 1): [(CUDA_BY_TABLE, 1)],
    (CUDA_ALL, 2): [(CUDA_HOST, 1)],
    (CUDA_BY_ROW, 2): [(CUDA_BY_TABLE, 2), (CUDA_BY_ROW, 1)],
    (CUDA_BY_TABLE, 2): [(CUDA_BY_ROW, 2)],
    (CUDA_FIXED_ORDER, 2): [(CUDA_BY_TABLE, 2)],
    (CUDA_ALL, 4): [(CUDA_BY_TABLE, 2)],
}


def num_steps(case: Case) -> int:
    """Of a run: fewer on the CPU, where every commit runs it."""
    return 100 if case.device == "cuda" else 40


def run(case: Case, world_size: int, *args, **options) -> list[dict]:
    backend = "nccl" if case.device == "cuda" else "gloo"
    return run_distributed(_train, world_size, case, args, options, backend=backend)


def _train(case, args, options):
    return train(case, *args, **options)


@pytest.fixture(scope="module", params=FORMS)
def trained(request, tmp_path_factory):
    """A form, what each of its ranks saw in a whole run, and a checkpoint from the middle of it."""
    case, world_size = request.param
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    results = run(case, world_size, 0, num_steps(case), save_at=SAVED, save_to=folder)
    return case, world_size, results, folder


def test_every_form_starts_with_the_same_rows(trained):
    _, _, results, _ = trained
    for result in results:
        for name, table in TABLES.items():
            rows = initial_rows(table, table=name, seed=SEED, first=0, last=table.num_embeddings)
            assert torch.equal(result["initial"][name], rows)


def test_rows_that_a_process_reads_by_itself_are_the_live_ones(trained):
    case, world_size, results, _ = trained
    for result in results:
        for name, rows in result["local"].items():
            if case.form == "sharded" and (case.cached or world_size > 1):
                assert rows is None
            else:
                assert torch.equal(rows, result["final"][name])


def test_a_lookup_returns_the_rows_in_the_order_of_the_ids(trained):
    _, world_size, results, _ = trained
    for rank, result in enumerate(results):
        rows, _ = rank_batch(0, rank, world_size)
        assert list(result["lookup"]) == rows.keys()
        for name, table in TABLES.items():
            for feature in table.features:
                expected = result["initial"][name][rows[feature].values()]
                assert torch.equal(result["lookup"][feature], expected)


def test_training_matches_the_oracle_on_every_rank(trained):
    case, _, results, _ = trained
    oracles = oracle_tables(case.rule, num_steps(case))
    for result in results:
        assert result["steps"] == num_steps(case)
        for name, oracle in oracles.items():
            expected = torch.tensor(oracle.w, dtype=torch.float64)
            moved = (expected - result["initial"][name]).abs().max()
            assert moved > 0.05, "a run that moves no row would prove nothing"
            torch.testing.assert_close(result["final"][name].double(), expected, **TOLERANCE)
            assert torch.equal(result["final"][name], results[0]["final"][name])


def test_a_resumed_run_ends_with_the_same_bits(trained):
    case, world_size, results, folder = trained
    resumed = run(case, world_size, SAVED, num_steps(case), load_from=folder, seed=SEED + 1)
    # Between GPUs ids are sent once, and then their gradients have no fixed order unless asked for.
    one_order = world_size == 1 and case.index_dedup == "auto"
    exact = case.device == "cpu" or one_order or case.deterministic
    allowed = {"rtol": 0, "atol": 0} if exact else TOLERANCE
    for result in resumed:
        assert result["steps"] == num_steps(case)
        for name in TABLES:
            torch.testing.assert_close(result["final"][name], results[0]["final"][name], **allowed)


def test_a_checkpoint_goes_to_other_ranks_plans_and_forms(trained):
    case, world_size, results, folder = trained
    for heir, heir_size in HEIRS[case, world_size]:
        last = num_steps(case)
        for result in run(heir, heir_size, SAVED, last, load_from=folder, seed=SEED + 1):
            for name in TABLES:
                torch.testing.assert_close(
                    result["final"][name], results[0]["final"][name], **TOLERANCE
                )


def test_the_plan_names_every_table(trained):
    case, world_size, results, _ = trained
    lines = results[0]["plan"].splitlines()
    # Weights, and the moments of the rule: full first and row-wise second, or row-wise alone.
    num_bytes = 4201 * 4 * (8 + 8 + 1 if case.rule == "adamw" else 8 + 1)
    assert lines[0].startswith("item: 4201 x 8, ")
    assert case.cached or f"{num_bytes} bytes" in lines[0]
    assert [line.split(":")[0] for line in lines] == list(TABLES)
    if case.form == "sharded":
        for line, table in zip(lines, TABLES.values(), strict=True):
            is_tiny = table.num_embeddings < world_size
            assert f"sharded {'table_wise' if is_tiny else case.sharding[0]}" in line
        by_rank = [line.split("by rank ")[1].split("; ") for line in lines]
        holders = [[part.split(":")[0] for part in parts] for parts in by_rank]
        if world_size == 2:
            by_row = case.sharding == ("row_wise",)
            assert sorted(map(tuple, holders))[0] == (("0", "1") if by_row else ("0",))
        for parts, table in zip(by_rank, TABLES.values(), strict=True):
            rows = [int(part.split(" rows")[0].split(": ")[1].replace(",", "")) for part in parts]
            assert sum(rows) == table.num_embeddings
        assert ("25.0% of the rows cached" in lines[0]) == case.cached


def _refusals(case: Case) -> dict[str, str]:
    """The messages of what a form refuses."""
    tables = case.build()
    rows, _ = rank_batch(0, 0, 1)
    messages = {}

    def attempt(name, action):
        try:
            action()
        except (ValueError, RuntimeError, IndexError) as error:
            messages[name] = f"{type(error).__name__}: {error}"

    beyond = rank_batch(0, 0, 1)[0]
    beyond.values()[0] = 10**6
    attempt("feature", lambda: tables.lookup(_renamed(rows)))
    attempt("table", lambda: next(tables.all_rows("itme")))
    attempt("full_weight", lambda: tables.full_weight("item"))
    if case.device == "cpu":  # on CUDA the assertion ends the process
        attempt("beyond", lambda: tables.lookup(beyond))
    return messages


def _renamed(rows):
    keys = ["colour", *rows.keys()[1:]]
    return KeyedJaggedTensor(keys=keys, values=rows.values(), lengths=rows.lengths())


@pytest.mark.parametrize("case", [REPLICATED, BY_ROW], ids=["replicated", "sharded"])
def test_mistakes_are_refused(case: Case):
    (messages,) = run_distributed(_refusals, 1, case)
    assert messages["feature"].startswith("ValueError: no embedding table serves")
    assert "'colour'" in messages["feature"]
    assert messages["table"].startswith("ValueError")
    assert "'itme'" in messages["table"]
    assert "beyond" in messages
    if case.form == "sharded":
        assert messages["full_weight"].startswith("ValueError")
        assert "sampled_softmax" in messages["full_weight"]
    else:
        assert "full_weight" not in messages


def test_forms_that_cannot_train_here_are_refused():
    with pytest.raises(ValueError, match=r"init_process_group.*form=replicated"):
        BY_ROW.build()
    (message,) = run_distributed(_build_message, 1, Case("sharded", "adamw"))
    assert "update_rule=row_wise_adagrad" in message
    with pytest.raises(ValueError, match=r"sharding must name"):
        Case("sharded", "adagrad", sharding=()).config()
    with pytest.raises(ValueError, match="column_wise splits a row"):
        Case("sharded", "adagrad", sharding=("row_wise", "column_wise")).config()
    with pytest.raises(ValueError, match="no first moment"):
        Case("sharded", "adagrad", momentum="host").config()
    only_sharded = Case("replicated", "adamw", weights="fp16", momentum="host", cached=True)
    with pytest.raises(ValueError, match=r"weights=fp16.*momentum=host.*item\.hbm_gb"):
        only_sharded.build()
    only_gpu = replace(BY_ROW, all_to_all="bf16", cached=True)
    (message,) = run_distributed(_build_message, 1, only_gpu)
    for setting in ("all_to_all=bf16", "item.hbm_gb"):
        assert setting in message


def test_rows_travel_in_half_precision():
    case = replace(BY_ROW, all_to_all="fp16")
    whole = run(BY_ROW, 2, 0, 10)
    halved = run(case, 2, 0, 10)
    for name in TABLES:
        got, exact = halved[0]["lookup"], whole[0]["lookup"]
        for feature in TABLES[name].features:
            assert torch.equal(got[feature], exact[feature].half().float())
        # Ten steps of about 0.03, whose direction the rounding of gradients changes little.
        difference = (halved[0]["final"][name] - whole[0]["final"][name]).abs().max()
        assert 0 < difference < 1e-3


def _train_with_bad_gradients(case: Case) -> tuple:
    tables = case.build()
    rows, grads = rank_batch(0, 0, 1)
    before = catalogue(tables)
    tables.set_lr(0.1)
    found = tables.lookup(rows.to(tables.device))
    loss = (found["item_id"] * grads["item_id"].to(tables.device)).sum()
    worst = torch.zeros_like(found["user_id"])
    worst[0, 3], worst[2, 0] = float("nan"), float("inf")
    (loss + (found["user_id"] * worst).sum()).backward()
    tables.optimizer_step()
    counts = [int(tables.take_num_nonfinite()) for _ in range(2)]
    return before, catalogue(tables), rows["item_id"].values(), counts


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(REPLICATED, id="replicated"),
        pytest.param(BY_ROW, id="sharded"),
        pytest.param(CUDA_BY_ROW, id="cuda", marks=pytest.mark.gpu),
    ],
)
def test_gradient_rows_that_are_not_finite_change_nothing_and_are_counted(case: Case):
    backend = "nccl" if case.device == "cuda" else "gloo"
    [(before, after, item_rows, counts)] = run_distributed(
        _train_with_bad_gradients, 1, case, backend=backend
    )
    assert counts == [2, 0]
    assert torch.isfinite(after["user"]).all()
    # At the first step, without a gradient, a row is moved by its decay alone.
    decay = 1 - 0.1 * (DECAY if case.rule == "adamw" else 0)
    moved = after["user"] != before["user"]
    torch.testing.assert_close(after["user"][moved], before["user"][moved] * decay)
    assert (after["item"][item_rows] != before["item"][item_rows]).any(1).all()


def _too_large() -> str:
    huge = TableConfig(num_embeddings=10**12, dim=64, features=("item_id",))
    config = EmbeddingsConfig(tables={"item": huge}, form="sharded", update_rule="row_wise_adagrad")
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="no way to spread") as error:
        build_tables(config, device=device, seed=0, num_sequences_hint=4, mean_length_hint=3.0)
    return str(error.value)


def test_tables_that_do_not_fit_are_refused_before_memory_is_taken():
    for message in run_distributed(_too_large, 2):
        assert f"item: 1000000000000 x 64, {260 * 10**12} bytes of host memory" in message
        assert "The largest is 'item'" in message
        assert "embeddings.weights=fp16" in message
        fits = int(message.split("num_embeddings up to about ")[1].split()[0])
        room = int(message.split("A rank has ")[1].split()[0])
        assert abs(fits * 260 - 2 * room) < 0.01 * room


def _build_message(case: Case) -> str:
    with pytest.raises(ValueError, match=r"CPU|GPU") as error:
        case.build()
    return str(error.value)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("sharded", "adagrad", weights="fp16"), id="cpu"),
        pytest.param(
            Case("sharded", "adamw", device="cuda", weights="fp16"),
            id="cuda",
            marks=pytest.mark.gpu,
        ),
    ],
)
def test_half_precision_weights_follow_to_their_rounding(case: Case):
    final = run(case, 1, 0, num_steps(case))[0]["final"]
    for name, oracle in oracle_tables(case.rule, num_steps(case)).items():
        expected = torch.tensor(oracle.w)
        # 2^-11 is half a unit in the last place of fp16; each step may round once more.
        allowed = num_steps(case) * 2.0**-11 * expected.abs().max()
        assert final[name].dtype == torch.float32
        assert torch.equal(final[name], final[name].half().float())
        assert (final[name] - expected).abs().max() < allowed
