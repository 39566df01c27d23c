"""The mathematics: a solver is a table of numbers per step, and one short loop integrates any table."""

from solvers.afs import AFS
from solvers.amed import AMED
from solvers.classical import (
    SOLVERS,
    adams_bashforth,
    ddpm,
    deis,
    dpm_solver_2,
    dpm_solver_pp,
    euler,
    heun,
    ipndm,
    midpoint,
    rk4,
    unipc,
)
from solvers.d_ode import fit_d_ode
from solvers.denoiser import Checkpointed, Conditioned, Counter, Deduplicated, Denoiser, FeatureDenoiser, Guided, Sharded
from solvers.epd import EPD, EPDTable
from solvers.integrate import Noise, advance, integrate, trajectory
from solvers.multistep import Multistep, MultistepTable
from solvers.parallel import ParallelStatistics, parallel_integrate
from solvers.policy import Distributions, Draw, Drawable, Policy, Spread
from solvers.predictor import Backbone, Metric, Predictor, load_predictor, save_predictor
from solvers.schedules import (
    discrete,
    discrete_sigma,
    discrete_time,
    dynamic_shift,
    flowmatch,
    logsnr,
    polynomial,
    time_uniform,
)
from solvers.table import Solver, StepTable, constant_table, depth

__all__ = [
    "AFS",
    "AMED",
    "EPD",
    "SOLVERS",
    "Backbone",
    "Checkpointed",
    "Conditioned",
    "Counter",
    "Deduplicated",
    "Denoiser",
    "Distributions",
    "Draw",
    "Drawable",
    "EPDTable",
    "FeatureDenoiser",
    "Guided",
    "Metric",
    "Multistep",
    "MultistepTable",
    "Noise",
    "ParallelStatistics",
    "Policy",
    "Predictor",
    "Sharded",
    "Solver",
    "Spread",
    "StepTable",
    "adams_bashforth",
    "advance",
    "constant_table",
    "ddpm",
    "deis",
    "depth",
    "discrete",
    "discrete_sigma",
    "discrete_time",
    "dpm_solver_2",
    "dpm_solver_pp",
    "dynamic_shift",
    "euler",
    "fit_d_ode",
    "flowmatch",
    "heun",
    "integrate",
    "ipndm",
    "load_predictor",
    "logsnr",
    "midpoint",
    "parallel_integrate",
    "polynomial",
    "rk4",
    "save_predictor",
    "time_uniform",
    "trajectory",
    "unipc",
]
