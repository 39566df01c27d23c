"""From the parameters of a schedule to its noise levels."""

from torch import Tensor

from backends import Spec
from solvers import logsnr, polynomial, time_uniform
from stages.params import LogSNR, Polynomial, Schedule, TimeUniform


def grid(schedule: Schedule, num_steps: int, spec: Spec) -> Tensor:
    """The schedule's num_steps nodes between the backbone's sigma_max and sigma_min."""
    match schedule:
        case Polynomial(rho=rho):
            return polynomial(num_steps, spec.sigma_min, spec.sigma_max, rho)
        case LogSNR():
            return logsnr(num_steps, spec.sigma_min, spec.sigma_max)
        case TimeUniform(rho=rho):
            return time_uniform(num_steps, spec.sigma_min, spec.sigma_max, rho)
