"""What the network of a diffusers pipeline is shown of a state, and what its output says about the data."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from solvers import Predictor, discrete_time, dynamic_shift
from solvers.predictor import Difference

TRAINING = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
"""What a scheduler's configuration says of a variance-preserving network's noise levels."""

FLOW = {"StableDiffusionPipeline": False, "StableDiffusion3Pipeline": True, "FluxPipeline": True}
"""Whether a pipeline's network is a flow."""

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


@dataclass(frozen=True)
class Preconditioning:
    """D(x, sigma) from a network's call, as its own scheduler's configuration describes it.

    A variance-preserving network is shown x / sqrt(1 + sigma^2) and a time in its table of noise levels, between whose entries
    it is interpolated; a flow network is shown x = (1 - sigma) x0 + sigma eps itself, and the time sigma.

    Attributes:
        prediction: what the network's output is.
        times: number of training times; the last is `times` - 1 (variance preserving) or `times` (flow).
        table: noise levels of a variance-preserving network's times, float64 (times,), increasing; None for a flow network.
    """

    prediction: Prediction
    times: int
    table: Tensor | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Preconditioning":
        """From a diffusers scheduler's configuration. Schedulers of flow models name no prediction type, or flow_prediction.

        Raises:
            ValueError: the configuration describes a network that is none of these.
        """
        prediction = config.get("prediction_type", "flow_prediction" if "shift" in config else None)
        if prediction not in get_args(Prediction):
            raise ValueError(f"prediction_type: {prediction!r}; valid: {', '.join(get_args(Prediction))}")
        if prediction == "flow_prediction":
            return cls(prediction, config["num_train_timesteps"], None)
        if config.get("beta_schedule") is None and config.get("trained_betas") is None:
            raise ValueError("beta_schedule, trained_betas: none; valid: one of them, for a variance-preserving network")
        if config.get("rescale_betas_zero_snr"):
            raise ValueError("rescale_betas_zero_snr: True, an infinite noise level; valid: False")
        betas: Tensor = DDPMScheduler(**{name: config[name] for name in TRAINING if name in config}).betas
        kept = (1 - betas.double()).cumprod(0)
        return cls(prediction, len(betas), ((1 - kept) / kept).sqrt())

    def check(self, predictor: Predictor, allow: Collection[Difference]) -> None:
        """Raise ValueError unless a predictor was made for such a network: its pipeline, and its noise levels."""
        predictor.used_for(allow=allow)
        made_for, first = predictor.backbone.pipeline, predictor.sigmas[0].item()
        if made_for in FLOW and FLOW[made_for] != self.is_flow and "backbone" not in allow:
            kind = "a flow network" if self.is_flow else "a variance-preserving network"
            valid = f"that of a {made_for}, which the predictor was made for"
            raise ValueError(f'backbone: {kind}; valid: {valid}, or allow=["backbone"]')
        if self.is_flow:
            if abs(first - 1) > 1e-6:
                raise ValueError(f"sigmas: from {first} on; valid: from 1 on, a flow network's noise")
        elif not self.sigma_max / 4 <= first <= self.sigma_max * (1 + 1e-3) and "sigmas" not in allow:
            valid = f"from about {self.sigma_max} on, the noise that the network was trained for"
            raise ValueError(f'sigmas: from {first} on; valid: {valid}, or allow=["sigmas"]')

    @property
    def is_flow(self) -> bool:
        """Whether x = (1 - sigma) x0 + sigma eps, not x0 + sigma eps."""
        return self.table is None

    @property
    def sigma_max(self) -> float:
        """The highest noise level that the network was trained for."""
        return 1.0 if self.table is None else self.table[-1].item()

    @property
    def sigma_min(self) -> float:
        """The lowest one."""
        return 1 / self.times if self.table is None else self.table[0].item()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The time that the network is shown for noise levels of any shape, float32; levels beyond the table are its ends."""
        if self.table is None:
            return (sigma * self.times).float()
        level = sigma.cpu().double()  # where the table is
        times = discrete_time(level.clamp(self.table[0], self.table[-1]), self.table) * self.times - 1
        return times.to(sigma.device, torch.float32)

    def network_input(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """What the network is shown of x (B, ...)."""
        return x if self.is_flow else x / (1 + sigma**2) ** 0.5

    def denoised(self, x: Tensor, output: Tensor, sigma: float | Tensor) -> Tensor:
        """D from the network's output at x, all (B, ...)."""
        match self.prediction:
            case "epsilon" | "flow_prediction":
                return x - sigma * output
            case "v_prediction":
                return x / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * output
            case "sample":
                return output

    def noised(self, x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        """The state at a noise level of data x0, (B, ...)."""
        return (1 - sigma) * x0 + sigma * noise if self.is_flow else x0 + sigma * noise


def flow_grid(config: Mapping[str, Any], tokens: int) -> tuple[float, float]:
    """A flow model's time shift, for images of that many tokens, and the lowest noise level of its grids.

    As diffusers' FlowMatchEulerDiscreteScheduler has them: the lowest training time is shifted once when the scheduler is made,
    where the shift is static, and again with the grid.
    """
    lowest = 1 / config["num_train_timesteps"]
    if config.get("use_dynamic_shifting"):
        shifts = (config.get("base_shift", 0.5), config.get("max_shift", 1.15))
        counts = (config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096))
        shift = dynamic_shift(tokens, shifts, counts)
        return shift, shifted(lowest, shift)
    return config["shift"], shifted(shifted(lowest, config["shift"]), config["shift"])


def shifted(time: float, shift: float) -> float:
    """The noise level at a time from 0 to 1 (Esser et al. 2024, equation 23)."""
    return shift * time / (1 + (shift - 1) * time)
