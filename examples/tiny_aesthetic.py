"""An aesthetic predictor with random weights, in the format of the published one."""

from pathlib import Path

import torch

from metrics.aesthetic import FILE
from metrics.head import Head


def saved_aesthetic(folder: Path, width: int, seed: int) -> Path:
    """Write the weights of a predictor from `width` features as metrics.aesthetic reads them. The seed draws them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.save(Head(width).state_dict(), folder / FILE)
    return folder
