"""The processes that torchrun starts: each does its share, and all hold the same results."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from stages.files import StageError

PATIENCE = timedelta(hours=6)
"""How long a rank waits for the others: validation and loading take one rank longer than another."""


SIZE = int(os.environ.get("WORLD_SIZE", "1"))
"""Processes that torchrun started; 1 without it."""
RANK = int(os.environ.get("RANK", "0")) if SIZE > 1 else 0
"""This one's number among them."""


class Ranks:
    """This process among its equals. Without torchrun it is alone, and nothing is sent."""

    def __init__(self) -> None:
        self.rank, self.size = RANK, SIZE
        if self.size > 1:
            dist.init_process_group("gloo", timeout=PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and talks."""
        return self.rank == 0

    def share(self, items: int) -> slice:
        """Which of so many items are this rank's: a consecutive part, as large as the others' but for 1."""
        return slice(items * self.rank // self.size, items * (self.rank + 1) // self.size)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over ranks of float64 numbers on the CPU; raises StageError where one of them has gone."""
        if self.size > 1:
            try:
                dist.all_reduce(numbers)
            except RuntimeError as error:
                raise StageError(f"rank {self.rank}: another rank has stopped, and says why ({error})") from error
        return numbers

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.sum(torch.zeros(1, dtype=torch.float64))

    def gather(self, mine: Tensor, items: int) -> Tensor:
        """All items' numbers (items, ...), from each rank's share of them."""
        every = torch.zeros(items, *mine.shape[1:], dtype=torch.float64)
        every[self.share(items)] = mine.double().cpu()
        return self.sum(every)

    def close(self) -> None:
        """Leave the others."""
        if self.size > 1:
            dist.destroy_process_group()
