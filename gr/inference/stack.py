"""The layers of an encoder over new tokens, in front of which older ones are cached.

Letters: B sequences, R new tokens, n rows, H heads, K and V dims, D model dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gr.baselines.cross_attention import CrossAttentionEncoder, CrossAttentionLayer
from gr.baselines.sasrec import SASRecEncoder, SASRecLayer
from gr.baselines.transformer import TransformerEncoder, TransformerLayer
from gr.hstu import HSTUEncoder, HSTULayer, attention_mask, truncated
from gr.inference import tails
from gr.inference.cache import KeyValueStore, LayerShape, page_bytes
from gr.rotary import rotations
from gr.sequence import SequenceInfo, tail_index
from kernels.hstu_attention import (
    AttentionMask,
    RelativeBias,
    hstu_attention,
    hstu_attention_cached,
)
from kernels.hstu_attention.cached import PAGE
from kernels.hstu_layer import Attend, Fp8Weights, LayerWeights, inference_weights
from kernels.rotary import Rotation

Rotations = tuple[Rotation, Rotation]


@dataclass(frozen=True)
class Layout:
    """Where layers that share a layout of their tokens find cached ones, and keep new ones."""

    number: int
    """0: all tokens. 1: those that attention truncation keeps."""
    lengths: Tensor
    """(B,) int64: cached tokens of each sequence."""
    max_len: int
    """At least the most of them; 0: none are, of any."""
    rows: Tensor | None = None
    """(n,) int64: rows of the store that keys and values go to; None: they are not kept."""
    keep: Tensor | None = None
    """(n,) int64: the new tokens that go there; None: all, in order."""

    def to(self, device: torch.device) -> "Layout":
        """Return the same on a device."""
        return replace(
            self,
            lengths=self.lengths.to(device),
            rows=None if self.rows is None else self.rows.to(device),
            keep=None if self.keep is None else self.keep.to(device),
        )


@dataclass(frozen=True)
class Pass:
    """New tokens, and what is cached in front of them."""

    info: SequenceInfo
    """Of the new tokens, whose `before` is all that is cached, context included. Candidates are at
    their end; its tails are the rows wanted."""
    pages: Tensor
    """(B, G) int32."""
    layouts: tuple[Layout, ...]
    """One, or two with attention truncation."""
    of_tails: bool = False
    """Whether the last layer makes the rows of the tails only: where nothing is cached."""
    windowed_candidates: bool = False
    """Whether a window applies to candidates."""
    of_one: bool = False
    """Whether all new tokens are candidates, and of the first sequence only is anything cached."""
    beside: int = 1
    """Passes like it that a GPU computes at the same time."""

    def to(self, device: torch.device) -> "Pass":
        """Return the same on a device."""
        info, before = self.info, self.info.before
        info = replace(
            info,
            offsets=info.offsets.to(device),
            tail_offsets=info.tail_offsets.to(device),
            timestamp=info.timestamp.to(device),
            query_time=info.query_time.to(device),
            session_start=info.session_start.to(device),
            num_candidates=info.num_candidates.to(device),
            before=None if before is None else before.to(device),
            groups=(),
        )
        layouts = tuple(layout.to(device) for layout in self.layouts)
        return replace(self, info=info, pages=self.pages.to(device), layouts=layouts)


class Stack:
    """An encoder's layers, evaluated without gradient.

    Args:
        encoder: of the model; its weights are read when the stack is made (`refresh`).
        dtype: of keys, values and the kernels.
    """

    def __init__(self, encoder: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(
            encoder, (HSTUEncoder, SASRecEncoder, TransformerEncoder, CrossAttentionEncoder)
        )
        self.encoder, self.dtype = encoder, dtype
        self.first_truncated = len(encoder.layers)
        if isinstance(encoder, HSTUEncoder):
            self.first_truncated = encoder.first_truncated
        self.layouts = 1 + (self.first_truncated < len(encoder.layers))
        self.shapes = [_shape(layer) for layer in encoder.layers]
        self._weights: list[tuple[LayerWeights, Fp8Weights | None]] = []
        self.refresh()

    def refresh(self) -> None:
        """Read the weights of the encoder anew."""
        if not isinstance(self.encoder, HSTUEncoder):
            return
        self._weights = []
        for layer in self.encoder.layers:
            assert isinstance(layer, HSTULayer)
            weights = layer.weights()
            x = weights.uvqk.new_empty(0, dtype=self.dtype)
            is_reference = self.encoder.is_reference(x)
            impl = "reference" if is_reference else self.encoder.config.impl
            with torch.no_grad():
                fp8 = layer.fp8_weights(weights, impl)
            # The reference casts by itself, as in training.
            kept = weights if is_reference else inference_weights(weights, self.dtype)
            self._weights.append((kept, fp8))

    def new_store(self, num_pages: int, device: torch.device) -> KeyValueStore:
        """Return a store of so many pages for keys and values of the layers."""
        return KeyValueStore(
            self.shapes, num_pages, dtype=self.dtype, device=device, layouts=self.layouts
        )

    def rotations(self, x_LD: Tensor, info: SequenceInfo) -> Rotations | None:
        """Return what queries and keys of new tokens are turned by."""
        encoder = self.encoder
        if info.before is not None:
            info = replace(info, num_context=0)  # the context is behind them
        if isinstance(encoder, TransformerEncoder):
            return encoder.rotations(x_LD, info)
        if not isinstance(encoder, HSTUEncoder) or encoder.config.rotary.angles == "none":
            return None
        return rotations(
            encoder.config.rotary,
            info,
            num_heads=encoder.config.num_heads,
            head_dim=encoder.config.qk_dim,
            dtype=x_LD.dtype,
        )

    def run(self, x_RD: Tensor, given: Pass, store: KeyValueStore) -> Tensor:
        """Return the encoder's rows of the tails, or of all new tokens; keep keys and values.

        Args:
            x_RD: the new tokens.
            given: what else there is to know of them, on their device.
            store: holds what is cached, and what is kept.
        """
        encoder = self.encoder
        if isinstance(encoder, HSTUEncoder) and not encoder.is_reference(x_RD):
            x_RD = x_RD.to(self.dtype)
        self._write_times(given, store)
        rotated = self.rotations(x_RD, given.info)
        tail = tail_index(given.info) if given.of_tails else None
        if isinstance(encoder, CrossAttentionEncoder):
            return self._run_cross(encoder, x_RD, given, store, tail)
        number = 0
        for index, layer in enumerate(encoder.layers):
            if index == self.first_truncated:
                number = 1
                if given.info.kept is not None:
                    x_RD, info, rotated = truncated(x_RD, given.info, rotated)
                    given = replace(given, info=info)
                    tail = tail_index(info) if given.of_tails else None
            is_last = index == len(encoder.layers) - 1
            tail_R = tail if is_last else None
            turned = rotated
            if turned is not None and tail_R is not None:
                turned = turned[0].rows(tail_R), turned[1]
            attend = self._attend(index, given, given.layouts[number], store, tail_R)
            if isinstance(layer, HSTULayer):
                weights, fp8 = self._weights[index]
                x_RD = layer.around(
                    x_RD, attend, tail_R=tail_R, rotations=turned, weights=weights, fp8=fp8
                )
            elif isinstance(layer, TransformerLayer):
                assert turned is not None
                x_RD = layer.around(x_RD, attend, turned, tail_R)
            else:
                assert isinstance(layer, SASRecLayer)
                x_RD = layer.around(x_RD, attend, tail_R)
        return encoder.normed(x_RD)

    def _run_cross(
        self,
        encoder: CrossAttentionEncoder,
        x_RD: Tensor,
        given: Pass,
        store: KeyValueStore,
        tail_R: Tensor | None,
    ) -> Tensor:
        """Return as `run` does: only the rows wanted go through the layers."""
        normed_RD = encoder.token_norm(x_RD)
        y_RD = x_RD if tail_R is None else x_RD.index_select(0, tail_R)
        for index, layer in enumerate(encoder.layers):
            attend = self._attend(index, given, given.layouts[0], store, tail_R)
            assert isinstance(layer, CrossAttentionLayer)
            y_RD = layer.around(y_RD, normed_RD, attend)
        return encoder.normed(y_RD)

    def _write_times(self, given: Pass, store: KeyValueStore) -> None:
        for layout in given.layouts:
            if layout.rows is None:
                continue
            time_R = given.info.timestamp
            if layout.number == 1 and given.info.kept is not None:
                time_R = truncated(time_R[:, None], given.info, None)[1].timestamp
            kept = time_R if layout.keep is None else time_R[layout.keep]
            store.time[layout.number].index_copy_(0, layout.rows, kept)

    def _attend(
        self,
        index: int,
        given: Pass,
        layout: Layout,
        store: KeyValueStore,
        tail_R: Tensor | None,
    ) -> Attend:
        """Return the attention of a layer, which keeps keys and values on the way."""
        info, layer = given.info, self.encoder.layers[index]
        query_time = info.query_time if tail_R is None else info.query_time[tail_R]
        arguments, bias, mask = _attention(layer, info, query_time)
        plain: Callable[..., Tensor] = partial(
            hstu_attention,
            mask=mask,
            bias=bias,
            num_candidates=info.num_candidates,
            q_offsets=None if tail_R is None else info.tail_offsets,
            max_q_len=None if tail_R is None else info.max_tail_len,
            max_len=info.max_len,
            **arguments,
        )
        if given.windowed_candidates and mask.local_window is not None:
            mask = replace(mask, windowed_candidates=True)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Emulated fp8 makes float32 of what kernels make in 16 bits.
            q, k, v = (x.to(self.dtype) for x in (q, k, v))
            if layout.rows is not None:
                kept = (k, v) if layout.keep is None else (k[layout.keep], v[layout.keep])
                store.write(index, layout.rows, *kept)
            # As in training, where the baselines' operator chooses its precision.
            enabled = isinstance(layer, HSTULayer) and torch.is_autocast_enabled(q.device.type)
            with torch.autocast(q.device.type, self.dtype, enabled=enabled):
                if layout.max_len == 0:
                    return plain(q, k, v, info.offsets)
                cached = store.keys(
                    index, layout.number, given.pages, layout.lengths, layout.max_len
                )
                assert tail_R is None
                softmax = arguments["activation"] == "softmax"
                if (
                    given.of_one
                    and not mask.windowed_candidates
                    and tails.is_faster(q, v, given.beside, impl=arguments["impl"], softmax=softmax)
                ):
                    return tails.attention_of_tails(
                        q, k, v, cached, info, mask=mask, bias=bias, **arguments
                    )
                return hstu_attention_cached(
                    q,
                    k,
                    v,
                    info.offsets,
                    cached,
                    max_len=info.max_len,
                    num_candidates=info.num_candidates,
                    mask=mask,
                    bias=bias,
                    **(arguments | {"impl": _cached_impl(arguments["impl"])}),
                )

        return attend


def tokens_within(num_bytes: int, stacks: Sequence[Stack]) -> int:
    """Return of how many tokens a store of each stack fits into so much memory.

    Raises:
        ValueError: if it is none.
    """
    page = sum(page_bytes(stack.shapes, stack.dtype, stack.layouts) for stack in stacks)
    num_pages = num_bytes // page
    if num_pages < 2:
        raise ValueError(
            f"cache_bytes must be at least {2 * page} (two pages of {PAGE} tokens), or 0 for no "
            f"cache, got {num_bytes}"
        )
    return (num_pages - 1) * PAGE


def _attention(
    layer: nn.Module, info: SequenceInfo, query_time: Tensor
) -> tuple[dict[str, Any], RelativeBias | None, AttentionMask]:
    """Return what the attention of a layer is called with, as in training."""
    if not isinstance(layer, HSTULayer):
        arguments: dict[str, Any] = {
            "alpha": _shape(layer).qk_dim ** -0.5,
            "scaling_length": None,
            "activation": "softmax",
            "impl": "auto",
        }
        return arguments, None, attention_mask(info)
    config = layer.config
    arguments = {
        "alpha": layer.alpha,
        "scaling_length": config.scaling_length if config.attention == "silu" else None,
        "activation": config.attention,
        "impl": "auto" if config.impl == "composed" else config.impl,
    }
    bias = layer.relative_bias(query_time, info.timestamp)
    return arguments, bias, attention_mask(info, config.semi_local)


def _cached_impl(impl: object) -> str:
    return "auto" if impl == "hopper" else str(impl)


def _shape(layer: nn.Module) -> LayerShape:
    if isinstance(layer, HSTULayer):
        return LayerShape(layer.config.num_heads, layer.config.qk_dim, layer.config.v_dim)
    assert isinstance(layer, (SASRecLayer, TransformerLayer, CrossAttentionLayer))
    dim = layer.output.in_features // layer.num_heads
    return LayerShape(layer.num_heads, dim, dim)
