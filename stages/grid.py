"""From the parameters of a schedule to its noise levels."""

from torch import Tensor

from backends import Spec
from solvers import discrete, flowmatch, logsnr, polynomial, time_uniform
from stages.params import Discrete, FlowMatch, LogSNR, Polynomial, Schedule, TimeUniform


def grid(schedule: Schedule, num_steps: int, spec: Spec) -> Tensor:
    """The schedule's num_steps nodes between the backbone's sigma_max and sigma_min.

    Raises:
        ValueError: the schedule is one of other backbones'.
    """
    low, high = spec.sigma_min, spec.sigma_max
    match schedule:
        case Polynomial(rho=rho):
            return polynomial(num_steps, low, high, rho)
        case LogSNR():
            return logsnr(num_steps, low, high)
        case TimeUniform(rho=rho):
            return time_uniform(num_steps, low, high, rho)
        case Discrete(rho=rho) if spec.table is not None:
            return discrete(num_steps, low, high, spec.table, rho)
        case FlowMatch() if spec.shift is not None:
            return flowmatch(num_steps, low, high, spec.shift)
    raise ValueError(f"schedule.name: {schedule.name}; valid: another, for this backbone")
