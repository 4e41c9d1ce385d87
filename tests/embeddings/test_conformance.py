"""One suite for every form of the tables: the same run, the same rows, to fp32 rounding."""

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.collection import build_tables
from embeddings.config import EmbeddingsConfig, TableConfig
from embeddings.tables import initial_rows
from tests.dist import run_distributed
from tests.embeddings.scenario import (
    SEED,
    TABLES,
    Case,
    oracle_tables,
    rank_batch,
    train,
)

SAVED = 17
TOLERANCE = {"rtol": 0, "atol": 1e-6}

REPLICATED = Case("replicated", "adamw")
BY_ROW = Case("sharded", "adagrad", ("row_wise",))
BY_TABLE = Case("sharded", "adagrad", ("table_wise",))
CUDA_BY_ROW = Case("sharded", "adamw", ("row_wise",), "cuda")
CUDA_BY_TABLE = Case("sharded", "adamw", ("table_wise",), "cuda")
CUDA_FIXED_ORDER = Case("sharded", "adamw", ("row_wise",), "cuda", deterministic=True)
FORMS = [
    pytest.param((REPLICATED, 1), id="replicated-1"),
    pytest.param((REPLICATED, 2), id="replicated-2"),
    pytest.param((BY_ROW, 1), id="row_wise-1"),
    pytest.param((BY_ROW, 2), id="row_wise-2"),
    pytest.param((BY_TABLE, 2), id="table_wise-2"),
    pytest.param((CUDA_BY_ROW, 1), id="cuda-row_wise-1", marks=pytest.mark.gpu),
    pytest.param((CUDA_BY_TABLE, 1), id="cuda-table_wise-1", marks=pytest.mark.gpu),
    pytest.param((CUDA_BY_ROW, 2), id="cuda-row_wise-2", marks=pytest.mark.multi_gpu),
    pytest.param((CUDA_BY_TABLE, 2), id="cuda-table_wise-2", marks=pytest.mark.multi_gpu),
    pytest.param((CUDA_FIXED_ORDER, 2), id="cuda-fixed_order-2", marks=pytest.mark.multi_gpu),
]
# What a checkpoint of a form is loaded by: fewer ranks, another plan, another form.
HEIRS = {
    (REPLICATED, 1): [(REPLICATED, 2)],
    (REPLICATED, 2): [(REPLICATED, 1)],
    (BY_ROW, 1): [(BY_TABLE, 2)],
    (BY_ROW, 2): [(BY_ROW, 1), (BY_TABLE, 2), (Case("replicated", "adagrad"), 1)],
    (BY_TABLE, 2): [(BY_ROW, 2), (BY_TABLE, 1)],
    (CUDA_BY_ROW, 1): [(CUDA_BY_TABLE, 1), (REPLICATED, 1)],
    (CUDA_BY_TABLE, 1): [(CUDA_BY_ROW, 1)],
    (CUDA_BY_ROW, 2): [(CUDA_BY_TABLE, 2), (CUDA_BY_ROW, 1)],
    (CUDA_BY_TABLE, 2): [(CUDA_BY_ROW, 2)],
    (CUDA_FIXED_ORDER, 2): [(CUDA_BY_TABLE, 2)],
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
    exact = case.device == "cpu" or world_size == 1 or case.deterministic
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
    assert f"{num_bytes} bytes" in lines[0]
    assert [line.split(":")[0] for line in lines] == list(TABLES)
    if case.form == "sharded":
        assert all(f"sharded {case.sharding[0]}" in line for line in lines)
        ranks = {line.split("rank(s) ")[1].split(",")[0] for line in lines}
        if world_size == 2:
            assert ranks == ({"0 1"} if case.sharding == ("row_wise",) else {"0", "1"})


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
    with pytest.raises(ValueError, match="fp32 weights"):
        Case("replicated", "adamw", weights="fp16").build()


def _too_large() -> str:
    huge = TableConfig(num_embeddings=10**12, dim=64, features=("item_id",))
    config = EmbeddingsConfig(tables={"item": huge}, form="sharded", update_rule="row_wise_adagrad")
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="no way to spread") as error:
        build_tables(config, device=device, seed=0, num_sequences_hint=4, mean_length_hint=3.0)
    return str(error.value)


def test_tables_that_do_not_fit_are_refused_before_memory_is_taken():
    for message in run_distributed(_too_large, 2):
        assert "item: 1000000000000 x 64" in message
        assert "embeddings.weights=fp16" in message


def _build_message(case: Case) -> str:
    with pytest.raises(ValueError, match="CPU") as error:
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
