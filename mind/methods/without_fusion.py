"""MIND without fusion: all views of a question in one step, of uniform weight (method, section 5).

No MetaNet, no selection, no consistency.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mind import config
from mind.methods.base import Method
from mind.records import Example


class WithoutFusion(Method):
    """The mean CE over the views of a question, or over those of them that `views` names."""

    caption = "MIND without fusion: uniform fine-tuning on all views of a question at once, or on the fixed ones that the variant names."
    options: config.WithoutFusion

    @classmethod
    def encoding(cls, options: Any, seed: int) -> Mapping[str, Any]:
        return {"views": list(options.views)}

    def select(self, example: Example) -> Mapping[str, str]:
        return {name: text for name, text in example.views.items() if name in self.options.views}
