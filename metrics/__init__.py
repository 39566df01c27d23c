"""Whatever scores images, one metric per file.

A Scorer maps images (B, C, H, W) in [0, 1] and their B prompts to scores (B,), float64.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

import torchvision_on_cpu as torchvision_on_cpu  # here, so that it precedes every import of torchvision

Scorer = Callable[[Tensor, Sequence[str]], Tensor]
