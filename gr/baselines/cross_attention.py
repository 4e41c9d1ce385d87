"""Candidate-to-history cross-attention: queries go through layers, the history does not.

Letters: L tokens, R rows of the result, D model dim, H heads, K = D / H.
"""

from functools import partial

from torch import Tensor, nn

from gr.baselines.attention import softmax_attention
from gr.baselines.transformer import NORM_EPS, LayerModules, rms_norm
from gr.config import ModelConfig
from gr.sequence import SequenceInfo, tail_if_shorter
from kernels.hstu_layer import Attend


class CrossAttentionEncoder(nn.Module):
    """Layers in which the rows that a loss reads attend to the tokens as they were embedded.

    Each layer reads the same keys' tokens through weights of its own, so that no event of history
    learns of another: the cost is that of the rows that are read, times the length.

    Args:
        config: `dim`, `num_layers` and `transformer` are read; ffn_dim as in Transformer++.

    Source: target attention stacked over the whole sequence as in STCA (arXiv 2511.06077), in the
        layers of gr/baselines/transformer.py; position and time come from the input encodings.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.layers = nn.ModuleList(CrossAttentionLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)

    def forward(self, x_LD: Tensor, info: SequenceInfo) -> Tensor:
        """Return (R, D): the rows of the tails, in the order of the tokens.

        Args:
            x_LD: floating, the tokens of all sequences.
            info: structure of the batch.
        """
        tail_R = tail_if_shorter(info, x_LD)
        normed_LD = rms_norm(x_LD, self.token_norm)
        y_RD = x_LD if tail_R is None else x_LD.index_select(0, tail_R)
        for layer in self.layers:
            y_RD = layer(y_RD, normed_LD, info, of_tails=tail_R is not None)
        return self.normed(y_RD)

    def normed(self, y_RD: Tensor) -> Tensor:
        """Return rows of the last layer after the final norm."""
        return rms_norm(y_RD, self.final_norm)


class CrossAttentionLayer(LayerModules):
    """One layer, S the rows that go through it and X the normed tokens.

        Z = S + dropout(W_o softmax(W_q rms_norm(S) (W_k X)^T / sqrt(K)) W_v X)
        M = rms_norm(Z);   Y = Z + dropout(W_2 (silu(W_g M) * W_1 M))               (no biases)

    Args:
        config: as of the encoder.
    """

    def forward(
        self, y_RD: Tensor, normed_LD: Tensor, info: SequenceInfo, *, of_tails: bool
    ) -> Tensor:
        """Return (R, D).

        Args:
            y_RD: rows of the tails, or of all tokens.
            normed_LD: all tokens.
            info: structure of the batch.
            of_tails: which of the two y_RD is.
        """
        return self.around(
            y_RD, normed_LD, partial(softmax_attention, info=info, of_tails=of_tails)
        )

    def around(self, y_RD: Tensor, normed_LD: Tensor, attend: Attend) -> Tensor:
        """Return (R, D) with the caller's attention, (q_RHK, k_LHK, v_LHK) -> (R, H, K)."""
        k_LD, v_LD = self.key_value(normed_LD).chunk(2, dim=1)
        q_RD = self.query(rms_norm(y_RD, self.attention_norm))
        q_RHK, k_LHK, v_LHK = (x.unflatten(1, (self.num_heads, -1)) for x in (q_RD, k_LD, v_LD))
        attended_RHK = attend(q_RHK, k_LHK, v_LHK)
        z_RD = y_RD + self.dropout(self.output(attended_RHK.flatten(1)))
        return self.feed_forward(z_RD)
