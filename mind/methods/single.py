"""One perspective only: eight such students are the experts of the latent analysis (method, sections 5 and 6)."""

from __future__ import annotations

from collections.abc import Mapping

from mind.methods.base import Method
from mind.records import Example


class Single(Method):
    def select(self, example: Example) -> Mapping[str, str]:
        return {name: text for name, text in example.views.items() if name == self.options.perspective}
