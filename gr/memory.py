"""Bytes of a training step, counted from the shapes, as `gr.flops` counts its arithmetic.

What is counted are the tensors that stand between forward and backward pass, and what stands for
the whole run. Beside these a backward pass needs room for the layer that it works on.

Letters: L tokens, R rows of the result, D model dim, H heads, K dim of queries, V dim of values.
"""

from dataclasses import dataclass

from embeddings.memory import table_bytes
from gr.config import HSTUConfig, ModelConfig, TrainConfig
from gr.flops import num_truncated
from gr.hstu import fp8_products
from gr.sequence import SequenceInfo

RECOMPUTABLE = ("normed", "uvqk", "silu", "gated", "attended")


@dataclass(frozen=True, kw_only=True)
class RunBytes:
    """Bytes of one process on its device, and in host memory."""

    activations: int
    """Of the encoder, from the forward to the backward pass of a batch."""
    parameters: int
    """Of the dense part, float32."""
    gradients: int
    """Of the dense part, float32."""
    optimizer: int
    """Both moments of the dense AdamW, float32."""
    tables: int
    """Rows and moments on the device."""
    host: int
    """Rows and moments in host memory."""

    @property
    def device(self) -> int:
        """All that is on the device."""
        dense = self.parameters + self.gradients + self.optimizer
        return self.activations + dense + self.tables


def run_bytes(
    config: TrainConfig,
    info: SequenceInfo,
    *,
    num_parameters: int,
    on_gpu: bool = True,
    ranks: int = 1,
) -> RunBytes:
    """Return what training on a batch takes.

    Args:
        config: of the run.
        info: structure of the batch.
        num_parameters: of the dense part.
        on_gpu: whether it is trained on a GPU.
        ranks: among which the rows of every table are spread evenly.
    """
    tables = [
        table_bytes(config.embeddings, table, -(-table.num_embeddings // ranks), on_gpu=on_gpu)
        for table in config.embeddings.tables.values()
    ]
    return RunBytes(
        activations=activation_bytes(
            config.model, info, itemsize=2 if config.precision == "bf16" else 4
        ),
        parameters=4 * num_parameters,
        gradients=4 * num_parameters,
        optimizer=8 * num_parameters,
        tables=sum(size.hbm for size in tables),
        host=sum(size.host for size in tables),
    )


def activation_bytes(model: ModelConfig, info: SequenceInfo, *, itemsize: int = 2) -> int:
    """Return the bytes that the fused layers of an HSTU encoder keep for the backward pass.

    The input of each layer counts, the encoder's result too. What `model.hstu.recompute` names is
    not kept. Not counted: rotary angles, shared by all layers, and indices of tails and truncation
    (8 bytes a row).

    Args:
        model: encoder hstu, with or without a mixture.
        info: lengths and tails of the batch.
        itemsize: bytes of a number between layers: 2 under bf16, 4 in float32.

    Raises:
        ValueError: for another encoder: what torch's operators keep is their own affair.
    """
    if model.encoder != "hstu":
        raise ValueError(
            f"activation_bytes counts what the fused HSTU layer keeps, got encoder={model.encoder}"
        )
    if model.mixture:
        return sum(_stack_bytes(model, group.info, itemsize) for group in info.groups)
    return _stack_bytes(model, info, itemsize)


def _stack_bytes(model: ModelConfig, info: SequenceInfo, itemsize: int) -> int:
    hstu, dim, rows = model.hstu, model.dim, info.num_rows
    tokens, truncated = info.timestamp.numel(), num_truncated(model)
    total = rows * dim * itemsize
    for layer in range(model.num_layers):
        if truncated and layer == model.num_layers - truncated:
            assert info.kept is not None
            tokens = info.kept.num_tokens
        is_last = layer == model.num_layers - 1
        total += layer_bytes(hstu, dim, tokens, rows if is_last else tokens, itemsize=itemsize)
    return total


def layer_bytes(hstu: HSTUConfig, dim: int, tokens: int, rows: int, *, itemsize: int = 2) -> int:
    """Return the bytes that one fused layer keeps, its input X included.

        X                        L D                always
        A V, before its norm     R H V              unless recompute names attended
        statistics               16 bytes a token   two norms; R H 4 more with softmax
        norm(X)                  L D                unless normed
        Z, U V Q K before SiLU   2 L H (K + V)      unless uvqk; of tails (R + L) H (K + V)
        U V Q K                  the same           unless silu or uvqk, or they stand in Z
        gated rows               R C                unless gated; C = H V, with concat_ua 3 H V

    In fp8 the layer's weights stand there twice more, a byte a number; a norm(X) that is kept is
    counted in 16 bits (in fp8, where that is what the gradient of the weight reads, it takes half).

    Args:
        hstu: options of the layer.
        dim: D.
        tokens: L.
        rows: R; L if every row is computed.
        itemsize: bytes of a number between layers.
    """
    H, K, V = hstu.num_heads, hstu.qk_dim, hstu.v_dim
    columns = H * V * (3 if hstu.concat_ua else 1)
    groups = H if hstu.norm == "group" else 1
    kept = [name for name in RECOMPUTABLE if name not in hstu.recompute]
    numbers = tokens * dim
    numbers += rows * H * V * ("attended" in kept)
    numbers += tokens * dim * ("normed" in kept)
    makes_them = hstu.uvqk_activation == "all" or hstu.rotary.angles != "none"
    copies = (1 + ("silu" in kept and makes_them)) * ("uvqk" in kept)
    numbers += (tokens + rows) * H * (K + V) * copies
    numbers += rows * columns * ("gated" in kept)
    statistics = 8 * tokens + 8 * groups * rows + 4 * H * rows * (hstu.attention == "softmax")
    shapes = {"uvqk": (dim, 2 * H * (K + V)), "output": (columns, dim)}
    weights = sum(2 * a * b + 4 * (a + b) for a, b in (shapes[p] for p in fp8_products(hstu, dim)))
    return numbers * itemsize + statistics + weights
