"""Makes `import torchvision` work beside a CPU build of torch; to be imported before it.

The torchvision of PyPI is built for CUDA. Beside a CPU build of torch its compiled operators do not load, and `import
torchvision` fails because two of them have no schema. Declaring the two is enough for all that does not call them.
"""

import importlib.util
import warnings
from pathlib import Path

import torch


def _declare_missing_operators() -> torch.library.Library | None:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    try:
        torch.ops.load_library(str(Path(found.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


LIBRARY = _declare_missing_operators()  # the declarations last as long as this object
warnings.filterwarnings("ignore", message="Failed to load image Python extension", category=UserWarning)
