"""MetaNet, the teaching assistant: features of a question and its rationales -> one compatibility score a view (method, section 2).

Letters: Q questions, K perspectives, H width of the student, W width of the net.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Batches = Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]


class MetaNet(nn.Module):
    """Feature alignment, perspective synergy (self-attention over the views on the table), adaptive scoring (a head per perspective).

    Args:
        features: width H of the features.
        views: K, absent ones included.
        self_attention: False scores every view by itself (ablation).
    """

    center: Tensor  # (2, H): of questions, of views
    scale: Tensor

    def __init__(self, features: int, views: int, *, width: int = 128, heads: int = 4, self_attention: bool = True) -> None:
        super().__init__()
        self.align_question = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width))
        self.align_view = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width))
        self.view_embedding = nn.Parameter(torch.randn(views, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True) if self_attention else None
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, 1)) for _ in range(views))
        # a pooled hidden state has a few huge dimensions: features are standardised by what the warm-up pass has seen
        self.register_buffer("center", torch.zeros(2, features))
        self.register_buffer("scale", torch.ones(2, features))

    def standardise(self, batches: Batches) -> None:
        """Fix centre and scale of the features, which come in batches and twice: (Q, H), (Q, K, H), (Q, K) each."""
        self.center.copy_(_means(batches, torch.zeros_like(self.center, dtype=torch.float64), power=1))
        deviation = _means(batches, self.center.double(), power=2).sqrt()
        self.scale.copy_(deviation.where(deviation > 1e-6, 1.0))  # what never varied (a single question) must not be blown up later

    def forward(self, questions: Tensor, views: Tensor, present: Tensor) -> Tensor:
        """Scores in (0, 1), 0 for absent views: (Q, H), (Q, K, H), (Q, K) bool -> (Q, K). At least one view of a question is present."""
        views = views.masked_fill(~present[..., None], 0.0)
        question = self.align_question((questions - self.center[0]) / self.scale[0])  # (Q, W)
        tokens = self.align_view((views - self.center[1]) / self.scale[1]) + question[:, None] + self.view_embedding  # (Q, K, W)
        if self.attention is not None:
            mixed, _ = self.attention(tokens, tokens, tokens, key_padding_mask=~present, need_weights=False)
            tokens = tokens + mixed
        tokens = self.norm(tokens)
        logits = torch.cat([head(tokens[:, k]) for k, head in enumerate(self.heads)], dim=1)  # (Q, K)
        return torch.sigmoid(logits).masked_fill(~present, 0.0)


def _means(batches: Batches, center: Tensor, power: int) -> Tensor:
    """Mean of (x - center) ** power over the questions and over the views present: (2, H)."""
    sums, counts = torch.zeros_like(center), torch.zeros(2, 1, dtype=torch.float64)
    for questions, views, present in batches():
        for row, values in enumerate((questions, views[present])):
            sums[row] += ((values.double() - center[row]) ** power).sum(dim=0)
            counts[row] += len(values)
    return sums / counts
