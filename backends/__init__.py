"""Whatever holds a frozen diffusion model: one file per family."""

import torchvision_on_cpu as torchvision_on_cpu  # here, so that it precedes every import of diffusers
from backends.backend import Backend, Spec, counted_denoiser
from backends.digits import Digits
from backends.gaussian import Gaussian

__all__ = ["Backend", "Digits", "Gaussian", "Spec", "counted_denoiser"]
