"""A predictor as the scheduler of a diffusers pipeline: one evaluation after the other."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from huggingface_hub import create_repo, hf_hub_download
from torch import Tensor

from backends.pipeline import check_backbone
from backends.preconditioning import TRAINING, Preconditioning
from solvers import AMED, Predictor, StepTable, load_predictor, save_predictor
from solvers.integrate import Outputs, advance, evaluation_state, next_state, output_of, put_analytic
from solvers.predictor import CARD, RECORD, TENSORS, Difference


@dataclass(frozen=True)
class Evaluation:
    """One call of the network: evaluation i of a step's table.

    Attributes:
        table: the step's numbers.
        i: the evaluation.
        first, last: whether it is the step's first or last.
        before: the steps before this one that call no network (an analytic first one), made when this one begins.
    """

    table: StepTable
    i: int
    first: bool
    last: bool
    before: tuple[StepTable, ...]

    @property
    def sigma(self) -> float:
        """Noise level of the state that the pipeline holds when it calls the network."""
        return float((*self.before, self.table)[0].ends[0] if self.first else self.table.node_levels[self.i])

    @property
    def shown(self) -> float:
        """Noise level that the network is shown."""
        return float(self.table.shown[self.i])


class PredictorScheduler(SchedulerMixin, ConfigMixin):
    """The scheduler of a Stable Diffusion, SD3 or FLUX pipeline that samples with a predictor.

    Every evaluation of a step is a `step()` of its own: the state that it returns is the one that the next evaluation is of,
    and `timesteps` holds what the network is shown at each. So an unchanged pipeline makes the image of `solvers.integrate`.
    num_inference_steps is the number of the table's steps, each of `order` evaluations. A callback that changes the latents
    changes the state by as much. The scheduler does not see the pipeline's guidance scale.

    A pipeline that starts in the middle (image to image) starts with a step, and the outputs that a multistep table would look
    back on are taken to be as the first one. Where the table's steps have different numbers of evaluations (with AFS, or
    several points), it may have to start inside one: Euler's method then leads to the next, and the step's other calls idle.

    A pipeline with it is saved and loaded as ever, but diffusers loads no scheduler of another package with a pipeline from the
    hub: push the scheduler alone.

    Args:
        predictor: of any family but AMED, which reads the network's features.
        prediction_type, num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: how the network was trained,
            as in diffusers' schedulers; flow_prediction for SD3 and FLUX. `from_predictor` takes them from another scheduler.

    Raises:
        ValueError: the predictor does not fit the network.
    """

    config_name = "scheduler_config.json"
    ignore_for_config = ["predictor"]  # noqa: RUF012  (as diffusers declares it)
    order = 1

    @register_to_config
    def __init__(
        self,
        *,
        predictor: Predictor,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
    ) -> None:
        self.predictor = predictor
        self.preconditioning = Preconditioning.of(self.config)
        self.preconditioning.check(predictor, ["sigmas"])  # what `from_config` checks of them, and can lift
        if predictor.afs and self.preconditioning.is_flow:
            raise ValueError(
                "afs: True; valid: False, since a flow pipeline calls the network at the noise itself; or sample()"
            )
        self._evaluations = evaluations(predictor)
        self._per_step = max(evaluation.table.evaluations for evaluation in self._evaluations)
        self.set_timesteps(predictor.table.num_steps - 1)

    @classmethod
    def from_predictor(
        cls,
        predictor: Predictor | Path | str,
        pipe: DiffusionPipeline | SchedulerMixin,
        allow: Collection[Difference] = (),
    ) -> "PredictorScheduler":
        """The scheduler of a predictor, or of its folder, for a pipeline.

        Args:
            predictor: itself, or where it lies.
            pipe: the pipeline; or its own scheduler alone, which does not say which model it belongs to.
            allow: "backbone": another model than the predictor was made for. "sigmas": noise levels beyond those that the
                network was trained for.
        """
        found = predictor if isinstance(predictor, Predictor) else load_predictor(predictor)
        if isinstance(pipe, DiffusionPipeline):
            check_backbone(found, pipe, allow)
            pipe = pipe.scheduler  # type: ignore[attr-defined]
        return cls.from_config(pipe.config, predictor=found, allow=allow)  # type: ignore[attr-defined]

    @classmethod
    def from_config(
        cls,
        config: Any = None,
        return_unused_kwargs: bool = False,
        *,
        predictor: Predictor | None = None,
        allow: Collection[Difference] = (),
        **kwargs: Any,
    ) -> Any:
        """Another scheduler's configuration with a predictor. What this one has no use for is kept for others, as ever."""
        if predictor is None:
            raise ValueError("predictor: none, and a configuration holds no table; valid: from_config(config, predictor=...)")
        merged = {key: value for key, value in {**config, **kwargs}.items() if not key.startswith("_")}
        preconditioning = Preconditioning.of(merged)
        preconditioning.check(predictor, allow)
        known = {name: merged.pop(name) for name in (*TRAINING, "prediction_type") if name in merged}
        scheduler = cls(predictor=predictor, **{**known, "prediction_type": preconditioning.prediction})
        scheduler.register_to_config(**merged)
        return (scheduler, {}) if return_unused_kwargs else scheduler

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Path | str,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """From a folder that `save_pretrained` wrote, or from the hub; arguments as those of any scheduler."""
        config, unused, commit = cls.load_config(  # type: ignore[misc]
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, return_commit_hash=True, **kwargs
        )
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if not folder.is_dir():
            names = ("cache_dir", "token", "local_files_only", "force_download")
            known = {name: kwargs[name] for name in names if name in kwargs}
            known["revision"] = commit or kwargs.get("revision")  # one snapshot for all files
            repo = str(pretrained_model_name_or_path)
            files = [hf_hub_download(repo, name, subfolder=subfolder, **known) for name in (TENSORS, RECORD)]
            folder = Path(files[0]).parent
        predictor = load_predictor(folder)
        return cls.from_config(config, return_unused_kwargs, predictor=predictor, allow=["backbone", "sigmas"], **unused)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Path | str, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write scheduler_config.json beside the predictor's own files."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_predictor(self.predictor, folder)
        super().save_pretrained(str(save_directory), push_to_hub=push_to_hub, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, with the predictor's own card (diffusers' would replace it by an empty one)."""
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with TemporaryDirectory() as work:
            folder = Path(work, repo_id.split("/")[-1])
            self.save_pretrained(folder)
            where = f'"{repo_id}"' if subfolder is None else f'"{repo_id}", subfolder="{subfolder}"'
            with (folder / CARD).open("a", encoding="utf-8") as card:
                card.write(f"\n## From the hub\n\n`pipe.scheduler = PredictorScheduler.from_pretrained({where})`\n")
            return self._upload_folder(
                folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr, subfolder=subfolder
            )

    def __len__(self) -> int:
        return self.preconditioning.times

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that a pipeline starts from."""
        return self.predictor.sigmas[0].item()

    @property
    def sigmas(self) -> Tensor:
        """The noise levels that the network is shown, and the final one, float32."""
        last = self.predictor.sigmas[-1].item()
        return torch.tensor([*(e.shown for e in self._evaluations), last], device=self.timesteps.device)

    @property
    def step_index(self) -> int | None:
        """How many evaluations precede the current one; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The evaluation that a pipeline starts with."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start with this evaluation.

        Raises:
            ValueError: there is none of this number.
        """
        if not 0 <= begin_index < len(self._evaluations):
            last = len(self._evaluations) - 1
            raise ValueError(f"begin index: {begin_index}; valid: 0 to {last} (image to image: a strength of a step or more)")
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin anew.

        Args:
            num_inference_steps: the number of the table's steps, which cannot be another.
            device: of `timesteps`.
            sigmas: FLUX's pipelines always give some: evenly spaced ones, in whose place the predictor's own are used. They
                then count evaluations as steps (order 1).
            mu: the shift for the pipeline's resolution, which the predictor's own noise levels stand above.

        Raises:
            ValueError: another number of steps, or other noise levels than the predictor's.
        """
        steps = self.predictor.table.num_steps - 1
        found = len(sigmas) if sigmas is not None else num_inference_steps
        if found != steps:
            raise ValueError(f"num_inference_steps: {found}; valid: {steps}, the steps of the predictor's table")
        if sigmas is not None and not np.allclose(sigmas, np.linspace(1.0, 1 / steps, steps)):
            self.predictor.check_sigmas(torch.tensor([*sigmas, self.predictor.sigmas[-1].item()], dtype=torch.float64))
        self.num_inference_steps = steps
        self.order = self._per_step if sigmas is None else 1
        shown = torch.tensor([evaluation.shown for evaluation in self._evaluations], dtype=torch.float64)
        self.timesteps = self.preconditioning.timestep(shown).to(device)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._forget()

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What a variance-preserving network is shown of the pipeline's latents, (B, ...)."""
        evaluation = self._evaluations[self._current(timestep)]
        x = sample.to(working(sample))
        if evaluation.first:
            x, outputs, _ = self._begun(evaluation, x)
            x = evaluation_state(evaluation.table, evaluation.i, x, outputs)
        return self.preconditioning.network_input(x, evaluation.shown).to(sample.dtype)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """From the network's output to the state of the next evaluation, or of the next step, or the final one.

        Args:
            model_output: at `sample`, (B, ...).
            timestep: from `timesteps`; only the first one is looked at.
            sample: what the step before returned, or what a callback made of it, (B, ...).
            return_dict: a SchedulerOutput, else a tuple.
        """
        index = self._current(timestep)
        if index >= len(self._evaluations):
            raise ValueError(f"step: more than {len(self._evaluations)} evaluations; valid: set_timesteps before another image")
        self._step_index = index + 1
        evaluation = self._evaluations[index]
        given, output = sample.to(working(sample)), model_output.to(working(sample))
        change = 0.0 if self._returned is None else given - self._returned.to(given)
        exact = given if self._state is None else self._state + change  # without the rounding to the pipeline's precision
        if evaluation.first:
            self._x, self._outputs, self._missing = self._begun(evaluation, exact)
            y = evaluation_state(evaluation.table, evaluation.i, self._x, self._outputs)
            state = self._evaluate(index, self._x, y, output)
        elif self._x is not None:
            self._x = self._x + change
            state = self._evaluate(index, self._x, exact, output)
        else:
            state = exact if self._returned is not None else self._lead(evaluation, exact, output)
        self._state, self._returned = state, state.to(sample.dtype)
        returned = self._returned.clone()  # a callback may change it in place
        if self._step_index == len(self._evaluations):
            self._forget()
        return SchedulerOutput(returned) if return_dict else (returned,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Data (B, ...) with noise of the current evaluation's level, or of the level of each timestep (B,)."""
        current = self._begin_index if self._step_index is None else self._step_index
        indices = [self._index_of(timestep) for timestep in timesteps.flatten()] if current is None else [current]
        last = self.predictor.sigmas[-1].item()
        levels = [self._evaluations[index].sigma if index < len(self._evaluations) else last for index in indices]
        x0 = original_samples.to(working(original_samples))
        sigma = torch.tensor(levels, device=x0.device, dtype=x0.dtype).view(-1, *[1] * (x0.ndim - 1))
        return self.preconditioning.noised(x0, noise, sigma).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as the pipelines of flow models call it."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def _forget(self) -> None:
        """Hold no image's tensors."""
        self._x: Tensor | None = None  # at the step's beginning
        self._state: Tensor | None = None  # what was returned last,
        self._returned: Tensor | None = None  # and what it is in the pipeline's precision
        self._outputs: Outputs = {}
        self._earlier: list[Tensor] = []
        self._missing = 0

    def _current(self, timestep: float | Tensor | None) -> int:
        """The evaluation that is next; the first time, where to begin."""
        if self._step_index is None:
            if self._begin_index is None:
                self._begin_index = 0 if timestep is None else self._index_of(timestep)
            self._step_index = self._begin_index
        return self._step_index

    def _index_of(self, timestep: float | Tensor) -> int:
        value = float(timestep)
        indices = (self.timesteps == value).nonzero()
        if not len(indices):
            raise ValueError(f"timestep: {value}; valid: {self.timesteps.tolist()}")
        return int(indices[0])

    def _begun(self, evaluation: Evaluation, x: Tensor) -> tuple[Tensor, Outputs, int]:
        """The state that a step begins with, the outputs that are there then, and how many earlier ones are missing."""
        earlier = self._earlier
        for table in evaluation.before:
            x, earlier = advance(never, table, x, earlier)
        table = evaluation.table
        missing = max(table.history - len(earlier), 0)
        outputs = dict(enumerate(earlier[len(earlier) - table.history + missing :], start=missing))
        if table.analytic_first:
            put_analytic(table, x, outputs)
        return x, outputs, missing

    def _evaluate(self, index: int, x: Tensor, y: Tensor, output: Tensor) -> Tensor:
        """Put an evaluation, of the state y in a step from x, in place; the state that comes next."""
        evaluation, outputs = self._evaluations[index], self._outputs
        table, i = evaluation.table, evaluation.i
        outputs[table.history + i] = output_of(table, i, y, self.preconditioning.denoised(y, output, evaluation.shown))
        for column in range(self._missing):  # after a start in the middle
            outputs.setdefault(column, outputs[table.history + i])
        if not evaluation.last:
            return evaluation_state(table, self._evaluations[index + 1].i, x, outputs)
        self._earlier = [outputs[column] for column in sorted(outputs)]
        return next_state(table, x, outputs)

    def _lead(self, evaluation: Evaluation, y: Tensor, output: Tensor) -> Tensor:
        """From inside a step to its end, by Euler's method."""
        denoised = self.preconditioning.denoised(y, output, evaluation.shown)
        return y + (float(evaluation.table.ends[1]) / evaluation.sigma - 1) * (y - denoised)


def never(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of steps that call none."""
    raise AssertionError("a step that calls no network called it")


def evaluations(predictor: Predictor) -> list[Evaluation]:
    """The calls of the network that a predictor makes, in their order."""
    if isinstance(predictor.table, AMED):
        raise ValueError("family: amed, which reads the network's features; valid: epd or multistep")
    found: list[Evaluation] = []
    before: tuple[StepTable, ...] = ()
    for step in range(len(predictor.sigmas) - 1):
        table = predictor(step, predictor.sigmas)
        if table.batch is not None:
            raise ValueError(f"table: one for each of {table.batch} images; valid: one for all")
        calls = [i for level in table.levels for i in level]
        found += [Evaluation(table, i, i == calls[0], i == calls[-1], before) for i in calls]
        before = () if calls else (*before, table)
    return found


def working(sample: Tensor) -> torch.dtype:
    """The precision that states are computed in: single, or double where the pipeline has that."""
    return torch.promote_types(sample.dtype, torch.float32)
