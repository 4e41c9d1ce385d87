"""Causal softmax attention over jagged sequences, as both Transformer baselines use it.

Letters: L tokens, R rows of the result, H heads, K dim of a head.
"""

import torch
from torch import Tensor

from gr.hstu import attention_mask
from gr.sequence import SequenceInfo
from kernels.hstu_attention import hstu_attention


def softmax_attention(
    q_RHK: Tensor, k_LHK: Tensor, v_LHK: Tensor, info: SequenceInfo, *, of_tails: bool
) -> Tensor:
    """Return (R, H, K): softmax(q k / sqrt(K)) v over the keys that HSTU sees, too.

    Args:
        q_RHK: queries of the tails, or of all tokens (R = L).
        k_LHK: keys of all tokens.
        v_LHK: values of all tokens.
        info: structure of the batch; candidates see the history and themselves only.
        of_tails: whether the queries are those of the tails.
    """
    # The operator chooses its own precision; autocast would cast again inside of its reference.
    with torch.autocast(q_RHK.device.type, enabled=False):
        return hstu_attention(
            q_RHK,
            k_LHK,
            v_LHK,
            info.offsets,
            max_len=info.max_len,
            alpha=q_RHK.shape[-1] ** -0.5,
            scaling_length=None,
            activation="softmax",
            mask=attention_mask(info),
            num_candidates=info.num_candidates,
            q_offsets=info.tail_offsets if of_tails else info.offsets,
            max_q_len=info.max_tail_len if of_tails else info.max_len,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
