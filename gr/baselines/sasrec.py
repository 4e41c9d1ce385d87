"""SASRec, as the published comparison with HSTU runs it.

Letters: L tokens, R rows of the result, D model dim, H heads, K = D / H.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from gr.baselines.attention import softmax_attention
from gr.config import ModelConfig
from gr.sequence import SequenceInfo, tail_if_shorter
from kernels.hstu_layer import Attend

NORM_EPS = 1e-8


class SASRecEncoder(nn.Module):
    """A stack of SASRec layers and a norm; the last layer computes the rows of the tails only.

    Args:
        config: `dim`, `num_layers` and `transformer` are read; ffn_dim 0 means D.

    Source: Kang & McAuley, "Self-Attentive Sequential Recommendation", 2018, whose positions are
    those of gr/encodings.py here and whose final norm is kept; layers and initial weights as in
    meta-recsys/generative-recommenders, research/modeling/sequential/sasrec.py.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SASRecLayer(config) for _ in range(config.num_layers))

    def forward(self, x_LD: Tensor, info: SequenceInfo) -> Tensor:
        """Return (R, D): the rows of the tails, in the order of the tokens.

        Args:
            x_LD: floating, the tokens of all sequences.
            info: structure of the batch.
        """
        for layer in self.layers[:-1]:
            x_LD = layer(x_LD, info)
        return self.normed(self.layers[-1](x_LD, info, tail_R=tail_if_shorter(info, x_LD)))

    def normed(self, y_RD: Tensor) -> Tensor:
        """Return rows of the last layer after the final norm."""
        return _norm(y_RD)


class SASRecLayer(nn.Module):
    """One layer; only the query is normed before attention, and the residuals start after norms.

        Q = norm(X);   Z = norm(Q + dropout(W_o softmax(W_q Q (W_k X)^T / sqrt(K)) W_v X))
        Y = Z + dropout(W_2 dropout(relu(W_1 Z)))          (all W with bias, norms without)

    The published code drops attention weights, this one the output of attention.

    Args:
        config: as of the encoder.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, ffn_dim = config.dim, config.transformer.ffn_dim or config.dim
        self.num_heads = config.transformer.num_heads
        self.dropout = nn.Dropout(config.transformer.dropout)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, dim)
        for linear in (self.query, self.key_value):
            # Xavier for the one (3 D, D) matrix that q, k and v are in the published code.
            nn.init.normal_(linear.weight, std=(2 / (4 * dim)) ** 0.5)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.output.bias)
        for linear in (self.output, self.ffn_in, self.ffn_out):
            nn.init.xavier_normal_(linear.weight)

    def forward(self, x_LD: Tensor, info: SequenceInfo, tail_R: Tensor | None = None) -> Tensor:
        """Return Y: (L, D), or (R, D) for the tokens `tail_R` (gr.sequence.tail_index)."""
        return self.around(
            x_LD, partial(softmax_attention, info=info, of_tails=tail_R is not None), tail_R
        )

    def around(self, x_LD: Tensor, attend: Attend, tail_R: Tensor | None) -> Tensor:
        """Return Y with the caller's attention, (q_RHK, k_LHK, v_LHK) -> (R, H, K)."""
        x_RD = x_LD if tail_R is None else x_LD.index_select(0, tail_R)
        normed_RD = _norm(x_RD)
        q_RHK = self.query(normed_RD).unflatten(1, (self.num_heads, -1))
        k_LD, v_LD = self.key_value(x_LD).chunk(2, dim=1)
        k_LHK, v_LHK = (x.unflatten(1, (self.num_heads, -1)) for x in (k_LD, v_LD))
        attended_RHK = attend(q_RHK, k_LHK, v_LHK)
        z_RD = _norm(normed_RD + self.dropout(self.output(attended_RHK.flatten(1))))
        hidden_RF = self.dropout(functional.relu(self.ffn_in(z_RD)))
        return z_RD + self.dropout(self.ffn_out(hidden_RF))  # type: ignore[no-any-return]


def _norm(x_LD: Tensor) -> Tensor:
    return functional.layer_norm(x_LD, x_LD.shape[-1:], eps=NORM_EPS)
