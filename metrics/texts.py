"""Prompts encoded once each."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROWS = 64
"""Prompts that are encoded at once."""


class Texts:
    """Prompts -> what a frozen encoder makes of them, (B, ...): each is encoded once, and the last `entries` are remembered.

    Args:
        encode: prompts (n,), n at most ROWS -> (n, ...).
        entries: the most to remember; what one call asks for is always.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], entries: int = 4096) -> None:
        self.encode = encode
        self.entries = entries
        self.found: OrderedDict[str, Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Prompts (B,) -> (B, ...).

        Raises:
            ValueError: there is no prompt.
        """
        if not prompts:
            raise ValueError("prompts: none; valid: at least one")
        asked = list(dict.fromkeys(prompts))
        new = [prompt for prompt in asked if prompt not in self.found]
        for part in (new[first : first + ROWS] for first in range(0, len(new), ROWS)):
            self.found.update(zip(part, self.encode(part).unbind(), strict=True))
        for prompt in asked:
            self.found.move_to_end(prompt)
        encoded = torch.stack([self.found[prompt] for prompt in prompts])
        while len(self.found) > max(self.entries, 0):
            self.found.popitem(last=False)
        return encoded
