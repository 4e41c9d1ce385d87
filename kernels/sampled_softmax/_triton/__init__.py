"""Sampled softmax without storing a logit.

logit_rn = (q_r . k_n) / T - log_q_n over the negatives n of the group of row r whose id is not that
of the positive; logit_r that of the positive.

Forward:  lse_r = log(exp(logit_r) + sum_n exp(logit_rn)), kept;  loss_r = lse_r - logit_r
Backward: p_rn = exp(logit_rn - lse_r) is computed again in tiles, c_r = dloss_r / T:
          dq_r = c_r (sum_n p_rn k_n + (p_r - 1) pos_r),  dpos_r = c_r (p_r - 1) q_r
          dk_n = sum_r c_r p_rn q_r
          1 - p_r is the sum of the p_rn where that is below 1/2, else 1 - exp(-loss_r)

R rows, N negatives, D dims. A program owns a block of rows (of negatives for dk) of one group; it
finds its group by binary search in the number of blocks of the groups before. Every sum has one
order: results are the same in every run.
"""

from kernels.sampled_softmax._triton.backward import sampled_softmax_bwd
from kernels.sampled_softmax._triton.forward import sampled_softmax_fwd
from kernels.sampled_softmax._triton.groups import MAX_DIM

__all__ = ["MAX_DIM", "sampled_softmax_bwd", "sampled_softmax_fwd"]
