"""The mathematics: a solver is a table of numbers per step, and one short loop integrates any table."""

from solvers.afs import AFS
from solvers.classical import SOLVERS, dpm_solver_2, dpm_solver_pp_2m, euler, heun, ipndm
from solvers.denoiser import Counter, Denoiser, Guided
from solvers.epd import EPD, EPDTable
from solvers.integrate import integrate, trajectory
from solvers.policy import Draw, Policy
from solvers.predictor import Predictor, load_predictor, save_predictor
from solvers.schedules import logsnr, polynomial, time_uniform
from solvers.table import Solver, StepTable, depth

__all__ = [
    "AFS",
    "EPD",
    "SOLVERS",
    "Counter",
    "Denoiser",
    "Draw",
    "EPDTable",
    "Guided",
    "Policy",
    "Predictor",
    "Solver",
    "StepTable",
    "depth",
    "dpm_solver_2",
    "dpm_solver_pp_2m",
    "euler",
    "heun",
    "integrate",
    "ipndm",
    "load_predictor",
    "logsnr",
    "polynomial",
    "save_predictor",
    "time_uniform",
    "trajectory",
]
