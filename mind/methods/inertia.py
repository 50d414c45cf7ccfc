"""The inertia filter: long-term losses of every question and view in place of the instantaneous ones (method, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


class Inertia:
    """Lbar <- mu * Lbar + (1 - mu) * L, per question and view, started from the first loss seen (the warm-up pass).

    Letters: N questions of the dataset, K perspectives, Q questions of a batch. NaN in `filtered`: never seen.
    """

    def __init__(self, questions: int, views: int, mu: float) -> None:
        self.mu = mu
        self.filtered = torch.full((questions, views), float("nan"))  # (N, K), on the CPU: it grows with the dataset

    def update(self, rows: Tensor, losses: Tensor, seen: Tensor) -> None:
        """Take in the losses (Q, K) of the questions `rows` (Q,) where `seen` (Q, K); the other views keep what they had."""
        old = self.filtered[rows]
        new = torch.where(old.isnan(), losses, self.mu * old + (1 - self.mu) * losses)
        self.filtered[rows] = torch.where(seen, new, old)
