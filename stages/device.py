"""Where pipelines and large metrics run."""

import os

import torch

from stages.files import InputError
from stages.params import Compute


def device_of(compute: Compute) -> torch.device:
    """The CPU, or a GPU: of several processes on a machine, each on the next of its GPUs.

    Raises:
        InputError: a GPU is asked for, and there is none.
    """
    there = torch.cuda.is_available()
    if compute.device == "cuda" and not there:
        raise InputError("compute.device: found cuda, and torch finds no such device here; valid: cpu, or auto")
    if compute.device == "cpu" or not there:
        if compute.offload:
            raise InputError("compute.offload: found true, without a CUDA device to offload from; valid: false")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
