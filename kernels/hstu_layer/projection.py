"""The two products of a layer and their gradients, in 16 bits or in fp8.

Where queries and keys are turned by rotary angles, their pairs stand side by side in Z, in act(Z)
and in the gradients of both: the columns of the weight are read in that order, and its gradient is
put back.

Letters: L tokens, R rows of the result (the tails, or R = L), D model dim, H heads, K dim of
queries and keys, V dim of values, F columns of a projection.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.hstu_layer._triton import silu_bwd, silu_bwd_fp8, silu_fwd
from kernels.hstu_layer.product import may_use_hopper, product, product_fp8
from kernels.hstu_layer.structure import Inputs
from kernels.linear import (
    QuantizedWeight,
    linear_fp8_dgrad,
    linear_fp8_forward,
    linear_fp8_wgrad,
)
from kernels.linear.fp8_registered import why_not_hopper as why_not_hopper_fp8
from kernels.linear.op import why_not_hopper
from kernels.quantize import QuantizedRows, quantize_rows
from kernels.rotary.columns import Turn, deinterleave, interleave


class Rows(NamedTuple):
    """Rows that a product reads, in the forms that are at hand: None where one is not."""

    plain: Tensor | None
    """In the dtype of the layer."""
    fp8: QuantizedRows | None = None

    def select(self, rows: Tensor | None) -> "Rows":
        """Return the rows of this index; all for None."""
        if rows is None:
            return self
        return Rows(
            None if self.plain is None else self.plain.index_select(0, rows),
            None if self.fp8 is None else _select(self.fp8, 0, rows),
        )


class Projection:
    """Columns of the UVQK projection for some of the tokens: act(X' W + b).

    Args:
        parts: letters of "uvqk", which stand in this order in `widths`.
        rows: index of the tokens; None means all.
        inputs: of the layer.
    """

    def __init__(self, parts: str, rows: Tensor | None, inputs: Inputs) -> None:
        self.parts, self.rows, self.options = parts, rows, inputs.options
        self.widths = [self.options.widths[part] for part in parts]
        self.silu_columns = self.options.silu_columns(parts)
        self.has_silu = self.silu_columns == sum(self.widths)
        """Whether on all columns; else on U's, if any."""
        self.dtype = inputs.x.dtype
        self.turns: dict[str, Turn] = {}
        """Of queries and keys, as columns of this projection."""
        first = 0
        for part, width in zip(parts, self.widths, strict=True):
            rotation = inputs.rotations.of(part)
            if rotation is not None:
                self.turns[part] = Turn(first, self.options.num_heads, rotation)
            first += width
        bias = inputs.weights.uvqk_bias
        self.bias = None if bias is None else self._columns(bias).contiguous()
        self.weight_DF = self._columns(inputs.weights.uvqk)

    def _columns(self, x: Tensor) -> Tensor:
        """Return the columns of this projection, of all of UVQK's, in its order."""
        if self.parts == "uvqk" and not self.turns:
            return x
        by_part = dict(
            zip("uvqk", torch.split(x, [*self.options.widths.values()], -1), strict=True)
        )
        H, turned = self.options.num_heads, self.turns
        return torch.cat(
            [interleave(by_part[p], H) if p in turned else by_part[p] for p in self.parts], -1
        )

    def _put_back(self, x: Tensor, parts: str) -> Tensor:
        """Return x with the columns of these parts in the caller's order."""
        if not self.turns or x.numel() == 0:
            return x
        H, widths = self.options.num_heads, [self.options.widths[part] for part in parts]
        return torch.cat(
            [
                deinterleave(columns, H) if part in self.turns else columns
                for part, columns in zip(parts, torch.split(x, widths, -1), strict=True)
            ],
            -1,
        )

    def _turns_from(self, first: int) -> tuple[Turn | None, Turn | None]:
        """Return how queries and keys are turned, as columns that begin with column `first`."""
        q, k = (
            None if turn is None else turn._replace(first=turn.first - first)
            for turn in (self.turns.get("q"), self.turns.get("k"))
        )
        return q, k

    def _act(self, z: Tensor, first: int, *, has_silu: bool) -> Tensor:
        """Return what act makes of the columns from `first` on, all alike."""
        turns = self._turns_from(first)
        if not has_silu and turns == (None, None):
            return z[:, first:]
        return silu_fwd(z[:, first:], has_silu=has_silu, turns=turns)

    def forward(self, normed: Rows, keep: bool) -> tuple[Tensor, Tensor]:
        """Return act(Z), and Z if `keep`, else an empty tensor."""
        columns, normed = self.silu_columns, normed.select(self.rows)
        is_z = columns == 0 and not self.turns
        turns = self._turns_from(0)
        apart = self.dtype == torch.float32 or (bool(self.turns) and not self._on_hopper(normed))
        if apart and not is_z:
            # In float32 torch's product; plain Triton's does not turn. The epilogue is a pass
            # apart: the one that the backward has.
            z = self._product(normed, 0, False, (None, None))[0]
            if self.has_silu:
                y = self._act(z, 0, has_silu=True)
            else:
                # SiLU on U, which is not turned, or on nothing.
                rest = self._act(z, columns, has_silu=False)
                y = torch.cat([silu_fwd(z[:, :columns]), rest], 1) if columns else rest
            return y, z if keep else z.new_empty(0)
        y, z = self._product(normed, columns, keep and not is_z, turns)
        return y, y if keep and is_z else z

    def _on_hopper(self, normed: Rows) -> bool:
        """Return whether `_product` runs on its Hopper kernel."""
        x = normed.plain
        assert x is not None
        weight_FD = x.new_empty(self.weight_DF.shape[::-1], device="meta")
        return may_use_hopper(x, self.options) and not why_not_hopper(x, weight_FD, None)

    def _product(
        self,
        normed: Rows,
        silu_columns: int,
        keep: bool,
        turns: tuple[Turn | None, Turn | None],
    ) -> tuple[Tensor, Tensor]:
        assert normed.plain is not None
        weight_FD = self.weight_DF.to(self.dtype).T.contiguous()
        operands = (normed.plain, weight_FD, self.bias, None)
        return product(*operands, silu_columns, keep, self.options, turns=turns)

    def activate(self, z: Tensor) -> dict[str, Tensor]:
        """Return the parts of act(Z) but U."""
        parts = self.split(z)
        parts.pop("u", None)
        width = sum(part.shape[1] for part in parts.values())
        y = self._act(z, z.shape[1] - width, has_silu=self.has_silu)
        return dict(
            zip(parts, torch.split(y, [p.shape[1] for p in parts.values()], 1), strict=True)
        )

    def split(self, y: Tensor) -> dict[str, Tensor]:
        """Return the parts, views of y."""
        return dict(zip(self.parts, torch.split(y, self.widths, 1), strict=True))

    def gradient_buffer(self, z: Tensor) -> Tensor:
        """Return where the gradient of Z goes; U's, if any, is put in its first columns."""
        # Z is ours where it was computed again, and each element is read before it is written.
        return torch.empty_like(z) if self.options.keep_uvqk else z

    def gradients(
        self, dparts: dict[str, Tensor], q_factor: float, z: Tensor, dz: Tensor, normed: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of X' and of the weight, and of the bias without U's columns.

        Args:
            dparts: gradient of each part of act(Z) but U, columns contiguous.
            q_factor: what that of Q is still to be multiplied by.
            z: Z.
            dz: gradient_buffer(z), with U's gradient in it.
            normed: X', of all tokens.
        """
        parts, of_parts = self._but_u(), self._turns_of_parts()
        dbias = silu_bwd(
            [dparts[part] for part in parts],
            z,
            dz,
            has_silu=self.has_silu,
            has_bias=self.bias is not None,
            turns=[of_parts.get(part) for part in parts],
            factors=[q_factor if part == "q" else 1.0 for part in parts],
        )
        x = normed.select(self.rows).plain
        assert x is not None
        dweight = self._put_back(x.T @ dz, self.parts)
        return dz @ self.weight_DF.to(self.dtype).T, dweight, self._put_back(dbias, parts)

    def _but_u(self) -> str:
        return self.parts.removeprefix("u")

    def _turns_of_parts(self) -> dict[str, Turn]:
        """Return how each part is turned, in columns of its own."""
        return {part: turn._replace(first=0) for part, turn in self.turns.items()}


class Fp8Projection(Projection):
    """The same with X', the weight and the gradient of Z rounded to fp8 by rows."""

    def __init__(self, parts: str, rows: Tensor | None, inputs: Inputs) -> None:
        super().__init__(parts, rows, inputs)
        assert inputs.fp8.uvqk is not None
        self.weight = inputs.fp8.uvqk
        if parts != "uvqk" or self.turns:
            columns = torch.arange(inputs.weights.uvqk.shape[1], device=inputs.x.device)
            columns = self._columns(columns)
            # Scales by columns stay those of the whole rows: larger than need be, at no loss.
            by_columns = self.weight.columns
            self.weight = QuantizedWeight(
                _select(self.weight.rows, 0, columns),
                QuantizedRows(_select(by_columns, 1, columns).values, by_columns.scale),
            )

    def _on_hopper(self, normed: Rows) -> bool:
        assert normed.fp8 is not None
        F, D = self.weight.rows.values.shape
        hopper = may_use_hopper(normed.fp8.values, self.options)
        return hopper and not why_not_hopper_fp8(F, D, self.dtype, None)

    def _product(
        self,
        normed: Rows,
        silu_columns: int,
        keep: bool,
        turns: tuple[Turn | None, Turn | None],
    ) -> tuple[Tensor, Tensor]:
        assert normed.fp8 is not None
        return product_fp8(
            normed.fp8,
            self.weight.rows,
            self.bias,
            silu_columns,
            keep,
            self._on_hopper(normed),
            dtype=self.dtype,
            turns=turns,
        )

    def gradient_buffer(self, z: Tensor) -> Tensor:
        """Return as Projection does, of U's columns alone where no more is stored in 16 bits."""
        if self.options.keep_uvqk and self.options.folds_uvqk:
            return z.new_empty(z.shape[0], self.options.widths["u"] if "u" in self.parts else 0)
        return super().gradient_buffer(z)

    def gradients(
        self, dparts: dict[str, Tensor], q_factor: float, z: Tensor, dz: Tensor, normed: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return as Projection does."""
        folds = self.options.folds_uvqk
        rows, dbias = silu_bwd_fp8(
            {part: dparts[part] for part in self._but_u()},
            z,
            dz,
            has_silu=self.has_silu,
            keep=not folds,
            has_bias=self.bias is not None,
            turns=self._turns_of_parts(),
            q_factor=q_factor,
        )
        dbias = self._put_back(dbias, self._but_u())
        impl, x = self.options.products, normed.select(self.rows)
        dnormed = linear_fp8_dgrad(rows, self.weight.columns, dtype=self.dtype, impl=impl)
        if folds:
            assert x.fp8 is not None
            dweight = linear_fp8_wgrad(rows, x.fp8, impl=impl).T
        else:
            assert x.plain is not None
            dweight = x.plain.T @ dz
        return dnormed, self._put_back(dweight, self.parts), dbias


def projections(inputs: Inputs) -> list[Projection]:
    """Return the projection of all tokens; with tails that of theirs and that of all."""
    kind = Projection if inputs.fp8.uvqk is None else Fp8Projection
    if inputs.tail is None:
        return [kind("uvqk", None, inputs)]
    return [kind("uq", inputs.tail, inputs), kind("vk", None, inputs)]


class Output:
    """The output projection: Y = residual + gated W^T + b.

    Args:
        inputs: of the layer.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.weight, self.bias = (
            inputs.weights.output.to(inputs.x.dtype),
            inputs.weights.output_bias,
        )
        self.fp8, self.options = inputs.fp8.output, inputs.options

    def forward(self, gated: Rows, residual: Tensor) -> Tensor:
        """Return Y.

        Args:
            gated: (R, C).
            residual: (R, D).
        """
        if self.fp8 is None:
            assert gated.plain is not None
            return product(gated.plain, self.weight, self.bias, residual, 0, False, self.options)[0]
        assert gated.fp8 is not None
        return linear_fp8_forward(
            gated.fp8,
            self.fp8.rows,
            self.bias,
            residual,
            dtype=self.weight.dtype,
            impl=self.options.products,
        )[0]

    def gradient_rows(self, dy: Tensor) -> Rows:
        """Return the gradient of Y in the forms that the next two read."""
        return Rows(dy) if self.fp8 is None else Rows(dy, quantize_rows(dy, impl="triton"))

    def dgrad(self, dy: Rows) -> Tensor:
        """Return the gradient of what it read."""
        if self.fp8 is None:
            assert dy.plain is not None
            return dy.plain @ self.weight
        assert dy.fp8 is not None
        return linear_fp8_dgrad(
            dy.fp8, self.fp8.columns, dtype=self.weight.dtype, impl=self.options.products
        )

    def wgrad(self, dy: Rows, gated: Rows) -> Tensor:
        """Return the gradient of the weight."""
        if self.fp8 is not None and self.options.folds_output:
            assert dy.fp8 is not None
            assert gated.fp8 is not None
            return linear_fp8_wgrad(dy.fp8, gated.fp8, impl=self.options.products)
        assert dy.plain is not None
        assert gated.plain is not None
        return dy.plain.T @ gated.plain


def _select(rows: QuantizedRows, dim: int, index: Tensor) -> QuantizedRows:
    # As bytes: not every operator of torch knows fp8.
    values = rows.values.view(torch.uint8).index_select(dim, index).view(rows.values.dtype)
    return QuantizedRows(values, rows.scale.index_select(0, index) if dim == 0 else rows.scale)
