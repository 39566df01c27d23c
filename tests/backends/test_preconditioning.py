import math
import warnings
from typing import Any

import pytest
import torch

with warnings.catch_warnings():  # of diffusers' and transformers' own imports
    warnings.simplefilter("ignore")
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
    )
    from tiny import tiny_sd15


from backends.preconditioning import Preconditioning, flow_grid
from solvers import dynamic_shift, flowmatch


def test_times_of_the_training_s_noise_levels_are_its_own() -> None:
    preconditioning = Preconditioning.of(tiny_sd15().scheduler.config)
    assert preconditioning.table is not None
    assert torch.allclose(preconditioning.timestep(preconditioning.table), torch.arange(1000.0), atol=1e-3)
    assert preconditioning.timestep(torch.tensor([1e-5, 1e5])).tolist() == [0, 999]
    flow = Preconditioning.of(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert flow.timestep(torch.tensor([1.0, 0.25])).tolist() == [1000, 250]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "epsilon"}, "beta_schedule, trained_betas: none; valid: one of them"),
        ({}, "prediction_type: None; valid: epsilon"),
        ({"prediction_type": "score"}, "prediction_type: 'score'; valid: epsilon, v_prediction, sample, flow_prediction"),
        (
            {"prediction_type": "epsilon", "beta_schedule": "linear", "rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr: True, .*; valid: False",
        ),
    ],
)
def test_a_network_trained_otherwise_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preconditioning.of(config)


@pytest.mark.parametrize(
    ("shift", "dynamic", "tokens"), [(3.0, False, 1024), (1.0, False, 64), (3.0, True, 4096), (3.0, True, 256)]
)
def test_a_flow_grid_is_the_scheduler_s_own(shift: float, dynamic: bool, tokens: int) -> None:
    """Its nodes but the last, which is 0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    scheduler.set_timesteps(10, mu=math.log(dynamic_shift(tokens)) if dynamic else None)  # type: ignore[arg-type]
    found, sigma_min = flow_grid(scheduler.config, tokens)
    grid = flowmatch(10, sigma_min, 1.0, found)
    assert torch.allclose(grid.float(), scheduler.sigmas[:-1], atol=1e-6)  # type: ignore[index]
