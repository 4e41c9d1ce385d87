"""Many candidates behind one cached history: the end of a sequence that is laid out whole.

The kernel of cached keys reads pages, and shares them out among programs; the causal kernel of
Hopper takes half its time for as many products, but reads a sequence in one place. Laying the
history out is one copy of its keys and values, which some thousand candidates pay for.

Letters: R candidates, G pages of the history at most, H heads, K and V dims.
"""

from typing import Any

from torch import Tensor

from gr.sequence import SequenceInfo
from kernels.dispatch import Impl, resolve
from kernels.hstu_attention import AttentionMask, CachedKeys, RelativeBias, hstu_attention
from kernels.hstu_attention.arguments import not_hopper
from kernels.hstu_attention.laid_out import laid_out

LEAST_ROWS = 2048
"""On an H200, 4 heads of 128, 8,192 keys: 57 us by pages and 88 as a tail of 1,024 candidates. Of
2,048 and 4,096 the tail takes 90 and 96, and the kernel by pages has two and four times the work
(docs/inference.md)."""


def is_faster(q: Tensor, v: Tensor, beside: int, *, impl: str, softmax: bool) -> bool:
    """Return whether queries of so many candidates are the kernel's for Hopper.

    Args:
        q: (R, H, K).
        v: (R, H, V).
        beside: passes of as many that a GPU computes at a time. Each of 1,024 candidates has 32
            blocks of queries, which the kernel does not divide, for 132 processors.
        impl: of the attention.
        softmax: what makes weights of scores.
    """
    refusal = not_hopper(q, v, softmax=softmax)
    is_hopper = resolve(impl, q, not_hopper=refusal) is Impl.HOPPER
    return len(q) * beside >= LEAST_ROWS and is_hopper


def attention_of_tails(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached: CachedKeys,
    info: SequenceInfo,
    *,
    mask: AttentionMask,
    bias: RelativeBias | None,
    **arguments: Any,
) -> Tensor:
    """Return (R, H, V): what hstu_attention_cached does of candidates of one request.

    Args:
        q: (R, H, K).
        k: (R, H, K).
        v: (R, H, V).
        cached: of the first sequence; others, of candidates that are left over, have none.
        info: of the candidates; all tokens are.
        mask: without a window of candidates.
        bias: query_time and key_time of the candidates.
        arguments: as of hstu_attention.
    """
    length = cached.lengths[:1]
    offsets = info.offsets + length
    offsets[:1].zero_()
    # On a GPU its length is not known; rows behind the sequences are no matter to kernels.
    rows = None if offsets.is_cuda else int(offsets[-1])
    keys, values = laid_out(k, v, cached)
    if bias is not None and bias.time_table is not None:
        assert cached.time is not None
        assert bias.key_time is not None
        times = cached._replace(k=cached.time[:, None, None], v=cached.time[:, None, None])
        new_time = bias.key_time[:, None, None]
        key_time = laid_out(new_time, new_time, times)[0][:rows, 0, 0]
        bias = RelativeBias(bias.position_table, bias.time_table, bias.query_time, key_time)
    return hstu_attention(
        q,
        keys[:rows],
        values[:rows],
        offsets,
        max_len=cached.max_len + info.max_len,
        mask=mask,
        bias=bias,
        num_candidates=info.num_candidates,
        q_offsets=info.offsets,
        max_q_len=info.max_len,
        **arguments,
    )
