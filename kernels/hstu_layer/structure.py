"""Weights and options of a layer, for its callers and for the registered operators.

Letters: L tokens, D model dim, H heads, K dim of queries and keys, V dim of values,
C = 3 H V with concat_ua, else H V.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from kernels.hstu_attention.structure import SCHEMA, Structure
from kernels.linear import QuantizedWeight
from kernels.quantize import QuantizedRows
from kernels.rotary import Rotation

RECOMPUTABLE = ("normed", "uvqk", "silu", "gated", "attended")
"""What the backward pass can compute again instead of reading it: norm(X); the projection that U,
V, Q and K are made of; these four themselves, which the projection gives anyway where it is made
again; what the output projection reads; A V, at the price of the attention."""
RECOMPUTED = RECOMPUTABLE[:4]
"""What it does compute again, unless it is told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """Parameters of a layer, each floating; cast to the dtype of the tokens where they multiply."""

    uvqk: Tensor
    """(D, H (2 K + 2 V)): columns of U, V, Q and K, each with the heads side by side."""
    output: Tensor
    """(D, C): the output projection, rows of outputs."""
    input_norm: Tensor | None = None
    """(D,), or None for 1."""
    input_norm_bias: Tensor | None = None
    """(D,), or None for 0."""
    uvqk_bias: Tensor | None = None
    """(H (2 K + 2 V),), or None for 0."""
    attention_norm: Tensor | None = None
    """(H V,), or None for 1."""
    attention_norm_bias: Tensor | None = None
    """(H V,), or None for 0."""
    output_bias: Tensor | None = None
    """(D,), or None for 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Weights:
    """The weights of the products that run in fp8: a product whose weight is None does not."""

    uvqk: QuantizedWeight | None = None
    """Of the transpose of LayerWeights.uvqk, outputs first as in LayerWeights.output."""
    output: QuantizedWeight | None = None
    """Of LayerWeights.output."""


PRODUCTS = ("uvqk", "output")
"""What Fp8Weights may hold."""


class Weights(NamedTuple):
    """LayerWeights in the order of WEIGHTS_SCHEMA."""

    uvqk: Tensor
    output: Tensor
    input_norm: Tensor | None
    input_norm_bias: Tensor | None
    uvqk_bias: Tensor | None
    attention_norm: Tensor | None
    attention_norm_bias: Tensor | None
    output_bias: Tensor | None


WEIGHTS_SCHEMA = (
    "Tensor uvqk, Tensor output, Tensor? input_norm, Tensor? input_norm_bias, Tensor? uvqk_bias, "
    "Tensor? attention_norm, Tensor? attention_norm_bias, Tensor? output_bias"
)


def flat_fp8(weights: Fp8Weights | None) -> list[Tensor | None]:
    """Return the tensors of both products, four each, None where a product is not in fp8."""
    found: list[Tensor | None] = []
    for product in PRODUCTS:
        weight = None if weights is None else getattr(weights, product)
        found += [None] * 4 if weight is None else [*weight.rows, *weight.columns]
    return found


def _of_flat(tensors: Sequence[Tensor | None]) -> Fp8Weights:
    """Undo flat_fp8."""
    found: dict[str, QuantizedWeight] = {}
    for i, product in enumerate(PRODUCTS):
        rows, row_scale, columns, column_scale = tensors[4 * i : 4 * i + 4]
        if rows is None or row_scale is None or columns is None or column_scale is None:
            continue
        found[product] = QuantizedWeight(
            QuantizedRows(rows, row_scale), QuantizedRows(columns, column_scale)
        )
    return Fp8Weights(**found)


class Reads(NamedTuple):
    """In which forms the backward pass reads some rows."""

    plain: bool
    fp8: bool


class Options(NamedTuple):
    """What else makes a layer, in the order of OPTIONS_SCHEMA."""

    num_heads: int
    qk_dim: int
    v_dim: int
    activate_all: bool
    """SiLU on U, V, Q and K, or on U only."""
    norm_groups: int
    """Of the norm of the attention output: 1, or one a head."""
    concat_ua: bool
    dropout: float
    eps: float
    keep_normed: bool
    keep_uvqk: bool
    keep_silu: bool
    keep_gated: bool
    keep_attended: bool
    hopper_products: bool
    """Whether the products may run on the Hopper kernels."""
    folds_uvqk: bool
    """Whether the gradient of this weight, if it is in fp8, is computed in fp8 too."""
    folds_output: bool
    """Likewise."""

    @property
    def products(self) -> str:
        """What a product is asked to run on."""
        return "auto" if self.hopper_products else "triton"

    @property
    def gate_is_whole(self) -> bool:
        """Whether one program of the gated norm holds a whole row of its result."""
        return self.norm_groups == 1 and not self.concat_ua

    @property
    def widths(self) -> dict[str, int]:
        """Columns of each part of a projection."""
        HK, HV = self.num_heads * self.qk_dim, self.num_heads * self.v_dim
        return {"u": HV, "v": HV, "q": HK, "k": HK}

    def silu_columns(self, parts: str) -> int:
        """Return to how many first columns of the projection to `parts` SiLU is applied."""
        active = parts if self.activate_all else parts[: parts.startswith("u")]
        return sum(self.widths[part] for part in active)


OPTIONS_SCHEMA = (
    "SymInt num_heads, SymInt qk_dim, SymInt v_dim, bool activate_all, SymInt norm_groups, "
    "bool concat_ua, float dropout, float eps, bool keep_normed, bool keep_uvqk, bool keep_silu, "
    "bool keep_gated, bool keep_attended, bool hopper_products, bool folds_uvqk, bool folds_output"
)


class Rotations(NamedTuple):
    """What queries and keys are turned by; all None, or none."""

    query_cos: Tensor | None = None
    """(R, G, K / 2) float32, G = 1 or H."""
    query_sin: Tensor | None = None
    key_cos: Tensor | None = None
    """(L, G, K / 2) float32."""
    key_sin: Tensor | None = None

    def of(self, part: str) -> Rotation | None:
        """Return that of the part q or k; None for the others, and if nothing is turned."""
        cos, sin = {"q": self[:2], "k": self[2:]}.get(part, (None, None))
        return None if cos is None or sin is None else Rotation(cos, sin)


class Inputs(NamedTuple):
    """Everything a layer is computed from, in the order of INPUTS_SCHEMA but grouped."""

    x: Tensor
    """(L, D)."""
    tail: Tensor | None
    """(R,) int64, the tokens whose rows are wanted; None means all."""
    seed: Tensor | None
    """One int64, with dropout."""
    rotations: Rotations
    weights: Weights
    fp8: Fp8Weights
    options: Options
    structure: Structure
    """Of the attention; None where that is the caller's (inference)."""

    @property
    def reads_normed(self) -> Reads:
        """Of norm(X): by the weight's gradient, and by the projection that is made again."""
        if self.fp8.uvqk is None:
            return Reads(plain=True, fp8=False)
        folds = self.options.folds_uvqk
        return Reads(plain=not folds, fp8=folds or not self.options.keep_uvqk)

    @property
    def keeps_activated(self) -> bool:
        """Whether act(Z) is kept beside Z: not where V, Q and K are columns of Z."""
        makes_them = self.options.activate_all or self.rotations.query_cos is not None
        return self.options.keep_silu and self.options.keep_uvqk and makes_them

    @property
    def folds_output(self) -> bool:
        """Whether the output projection's weight gradient reads fp8.

        Those rows are never kept: the gated norm's backward kernel writes them at the price of the
        byte a number that keeping them would take.
        """
        return self.fp8.output is not None and self.options.folds_output

    @property
    def flat(self) -> tuple[Any, ...]:
        """The arguments of INPUTS_SCHEMA."""
        fp8 = flat_fp8(self.fp8)
        return *self[:3], *self.rotations, *self.weights, fp8, *self.options, *self.structure

    @staticmethod
    def of(flat: Sequence[Any]) -> "Inputs":
        """Group the arguments of INPUTS_SCHEMA."""
        x, tail, seed, *rotations = flat[:FIRST_WEIGHT]
        return Inputs(
            x,
            tail,
            seed,
            Rotations(*rotations),
            Weights(*flat[FIRST_WEIGHT:FP8]),
            _of_flat(flat[FP8]),
            Options(*flat[FIRST_OPTION:FIRST_OF_STRUCTURE]),
            Structure(*flat[FIRST_OF_STRUCTURE:]),
        )


INPUTS_SCHEMA = (
    "Tensor x, Tensor? tail, Tensor? seed, Tensor? query_cos, Tensor? query_sin, Tensor? key_cos, "
    f"Tensor? key_sin, {WEIGHTS_SCHEMA}, Tensor?[] fp8, "
    f"{OPTIONS_SCHEMA}, {SCHEMA.replace('=False', '')}"
)
"""Without defaults: torch 2.11 leaves out arguments that equal them, and then misses them where
there is a list of tensors among the others."""
FIRST_WEIGHT = 3 + len(Rotations._fields)
FP8 = FIRST_WEIGHT + len(Weights._fields)
"""A list: a registered operator takes at most 64 arguments."""
FIRST_OPTION = FP8 + 1
FIRST_OF_STRUCTURE = FIRST_OPTION + len(Options._fields)
FIRST_VALUE = FIRST_OF_STRUCTURE + Structure._fields.index("max_len")
"""Of the structure, what is no tensor."""


class Saved(NamedTuple):
    """What the forward pass leaves to the backward pass, in the order of its results.

    R rows: the tails, or all tokens (R = L). Empty where it is computed again, or not needed.
    """

    normed: Tensor
    """(L, D)."""
    normed_fp8: Tensor
    """(L, D) float8_e4m3fn."""
    normed_scale: Tensor
    """(L,) float32, of its rows."""
    uvqk: Tensor
    """(L, H (2 K + 2 V)) before SiLU; with tails (R, H (K + V)), U and Q."""
    vk: Tensor
    """With tails (L, H (K + V)) before SiLU, V and K."""
    act_uvqk: Tensor
    """`uvqk` after SiLU, queries and keys turned."""
    act_vk: Tensor
    """Likewise."""
    attended: Tensor
    """(R, H, V), before the norm."""
    gated: Tensor
    """(R, C)."""
    lse: Tensor
    """(R, H) float32 with softmax."""
    mean: Tensor
    """(L,) float32, of the norm of X."""
    rstd: Tensor
    """(L,) float32."""
    gate_mean: Tensor
    """(R, groups) float32, of the norm of the attention output."""
    gate_rstd: Tensor
    """(R, groups) float32."""
