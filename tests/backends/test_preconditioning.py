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


from backends.preconditioning import Preconditioning


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
