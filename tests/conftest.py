import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes that tests start

import pytest
import torch
from torch import Tensor

from backends import Gaussian

torch.set_num_threads(1)


@pytest.fixture
def mixture() -> Gaussian:
    """Three modes in four dimensions."""
    generator = torch.Generator().manual_seed(0)
    return Gaussian(
        means=torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64),
        stds=torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    )


@pytest.fixture
def start() -> Tensor:
    """Unit noise of eight samples."""
    return torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: else one process would wait for another that runs them at the end."""
    longest = ("test_server", "test_tiny_pipeline", "test_long_runs", "test_text_to_image", "test_rdpo", "test_distill")
    items.sort(key=lambda item: next((place for place, name in enumerate(longest) if name in item.nodeid), len(longest)))
