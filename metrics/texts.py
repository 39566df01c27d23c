"""Prompts encoded once each."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Texts:
    """Prompts -> what a frozen encoder makes of them, (B, ...): each is encoded once, and the last `entries` are remembered.

    One by one: what a prompt becomes does not depend on others, to the bit.

    Args:
        encode: a prompt -> (1, ...).
        entries: the most to remember; what one call asks for is always.
    """

    def __init__(self, encode: Callable[[str], Tensor], entries: int = 4096) -> None:
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
        self.found.update((prompt, self.encode(prompt)[0]) for prompt in new)
        for prompt in asked:
            self.found.move_to_end(prompt)
        encoded = torch.stack([self.found[prompt] for prompt in prompts])
        while len(self.found) > max(self.entries, 0):
            self.found.popitem(last=False)
        return encoded
