"""Whatever holds a frozen diffusion model: one file per family."""

from backends.backend import Backend, Spec, counted_denoiser
from backends.digits import Digits
from backends.gaussian import Gaussian

__all__ = ["Backend", "Digits", "Gaussian", "Spec", "counted_denoiser"]
