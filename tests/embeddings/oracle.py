"""Row-wise updates one row at a time in Python floats (fp64), written from the equations."""

import math

from torch import Tensor


class RowWiseOracle:
    """One table under row-wise AdamW (rule "adamw") or row-wise Adagrad ("adagrad")."""

    def __init__(self, weight, rule, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.w = weight.double().tolist()
        self.m = [[0.0] * len(row) for row in self.w]
        self.v = [0.0] * len(self.w)
        self.rule, self.lr, self.betas, self.eps, self.decay = rule, lr, betas, eps, weight_decay
        self.t = 0

    def step(self, rows: Tensor, grads: Tensor) -> None:
        self.t += 1
        summed: dict[int, list[float]] = {}
        for row, grad in zip(rows.tolist(), grads.double().tolist(), strict=True):
            old = summed.get(row, [0.0] * len(grad))
            summed[row] = [a + b for a, b in zip(old, grad, strict=True)]
        for row, g in summed.items():
            mean_square = sum(x * x for x in g) / len(g)
            if self.rule == "adagrad":
                self.v[row] += mean_square
                scale = self.lr / (math.sqrt(self.v[row]) + self.eps)
                self.w[row] = [w - scale * x for w, x in zip(self.w[row], g, strict=True)]
                continue
            b1, b2 = self.betas
            self.v[row] = b2 * self.v[row] + (1 - b2) * mean_square
            root = math.sqrt(self.v[row] / (1 - b2**self.t)) + self.eps
            for i, x in enumerate(g):
                self.m[row][i] = b1 * self.m[row][i] + (1 - b1) * x
                m_hat = self.m[row][i] / (1 - b1**self.t)
                self.w[row][i] -= self.lr * (m_hat / root + self.decay * self.w[row][i])
