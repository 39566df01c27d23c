"""A predictor in a diffusers pipeline: as its scheduler, one evaluation after the other, or a step's points as one batch."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import (
    ConfigMixin,
    DiffusionPipeline,
    FluxPipeline,
    SchedulerMixin,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo, hf_hub_download
from torch import Tensor

from backends.backend import counted_denoiser
from backends.flux import Flux
from backends.preconditioning import Preconditioning
from backends.stable_diffusion import StableDiffusion
from backends.stable_diffusion_3 import StableDiffusion3
from solvers import AMED, Predictor, StepTable, integrate, load_predictor, save_predictor
from solvers.integrate import Outputs, advance, evaluation_state, next_state, output_of, put_analytic
from solvers.predictor import RECORD, TENSORS, Difference

LOG = logging.getLogger(__name__)


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
    changes the state by as much. Where a pipeline starts in the middle (image to image), it starts at a step, and the
    outputs that a multistep table would look back on are taken to be as the first one.

    Args:
        predictor: of any family but AMED, which reads the network's features.
        prediction_type, num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: how the network was trained,
            as in diffusers' schedulers; flow_prediction for SD3 and FLUX. `from_predictor` takes them from another scheduler.
        use_flow_sigmas: tells FLUX's pipeline to leave the noise levels to the scheduler.

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
        use_flow_sigmas: bool = True,
    ) -> None:
        self.predictor = predictor
        self.preconditioning = Preconditioning.of(self.config)
        check_fit(predictor, self.preconditioning, ["sigmas"])  # which `from_predictor` checks, and can lift
        if predictor.afs and self.preconditioning.is_flow:
            raise ValueError(
                "afs: True; valid: False, since a flow pipeline calls the network at the noise itself; or sample()"
            )
        self._evaluations = evaluations(predictor)
        self._per_step = max(evaluation.table.evaluations for evaluation in self._evaluations)
        self.set_timesteps(predictor.table.num_steps - 1)

    @classmethod
    def from_predictor(
        cls, predictor: Predictor | Path | str, scheduler: SchedulerMixin, allow: Collection[Difference] = ()
    ) -> "PredictorScheduler":
        """The scheduler of a predictor, or of its folder, for the network that another scheduler was made for.

        Args:
            predictor: itself, or where it lies.
            scheduler: the pipeline's own.
            allow: ["sigmas"] lifts the check that the predictor's noise levels are within what the network was trained for.
        """
        found = predictor if isinstance(predictor, Predictor) else load_predictor(predictor)
        config: FrozenDict = scheduler.config  # type: ignore[attr-defined]
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        known = {name: config[name] for name in names if name in config}
        preconditioning = Preconditioning.of(config)
        check_fit(found, preconditioning, allow)
        return cls(predictor=found, prediction_type=preconditioning.prediction, **known)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Path | str,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """From a folder that `save_pretrained` wrote, or from the hub; arguments as those of any scheduler."""
        config, unused, _ = cls.load_config(  # type: ignore[misc]
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, return_commit_hash=True, **kwargs
        )
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if not folder.is_dir():
            names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
            known = {name: kwargs[name] for name in names if name in kwargs}
            files = [
                hf_hub_download(str(pretrained_model_name_or_path), name, subfolder=subfolder, **known)
                for name in (TENSORS, RECORD)
            ]
            folder = Path(files[0]).parent
        return cls.from_config(config, return_unused_kwargs, predictor=load_predictor(folder), **unused)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Another scheduler's configuration with a predictor, given by its name: from_config(config, predictor=...)."""
        predictor = kwargs.pop("predictor", None)
        if not isinstance(predictor, Predictor):
            raise ValueError("predictor: none, and a configuration holds no table; valid: from_config(config, predictor=...)")
        init, rest, _ = cls.extract_init_dict(config, **kwargs)
        init["prediction_type"] = Preconditioning.of(config).prediction
        scheduler = cls(predictor=predictor, **init)
        return (scheduler, rest) if return_unused_kwargs else scheduler

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Path | str, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write scheduler_config.json beside the predictor's own files."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_predictor(self.predictor, folder)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

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
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
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
    def step_index(self) -> int | None:
        """How many evaluations precede the current one; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The evaluation that a pipeline starts with."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start with this evaluation, a step's first; inside a step, with the next one, and the calls until then are idle.

        Raises:
            ValueError: there is no step that starts there or later.
        """
        starts = [index for index, evaluation in enumerate(self._evaluations) if evaluation.first]
        following = [start for start in starts if start >= begin_index]
        if begin_index < 0 or not following:
            where = "where the predictor's steps start (image to image: more strength)"
            raise ValueError(f"begin index: {begin_index}; valid: {starts}, {where}")
        self._begin_index, self._start = begin_index, following[0]
        if idle := self._start - begin_index:
            LOG.warning("begin index %d is inside a step: starting with the next one, after %d idle calls", begin_index, idle)

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
            sigmas: FLUX's image-to-image pipelines always give some: evenly spaced ones, in whose place the predictor's own are
                used. They then count evaluations as steps (order 1).
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
        self._start = 0
        self._outputs: Outputs = {}
        self._earlier: list[Tensor] = []
        self._missing = 0

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What a variance-preserving network is shown of the pipeline's latents, (B, ...)."""
        evaluation = self._evaluations[max(self._current(timestep), self._start)]
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
        if index < self._start:
            return SchedulerOutput(sample) if return_dict else (sample,)
        evaluation = self._evaluations[index]
        table, i = evaluation.table, evaluation.i
        given, output = sample.to(working(sample)), model_output.to(working(sample))
        if evaluation.first:
            self._x, self._outputs, self._missing = self._begun(evaluation, given)
            y = evaluation_state(table, i, self._x, self._outputs)
        else:
            self._x = self._x + (given - self._returned.to(given))
            y = given
        denoised = self.preconditioning.denoised(y, output, evaluation.shown)
        self._outputs[table.history + i] = output_of(table, i, y, denoised)
        for column in range(self._missing):  # after a start in the middle
            self._outputs.setdefault(column, self._outputs[table.history + i])
        if evaluation.last:
            state = next_state(table, self._x, self._outputs)
            self._earlier = [self._outputs[column] for column in sorted(self._outputs)]
        else:
            state = evaluation_state(table, self._evaluations[index + 1].i, self._x, self._outputs)
        self._returned = state.to(sample.dtype)
        returned = self._returned.clone()  # a callback may change it in place
        return SchedulerOutput(returned) if return_dict else (returned,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Data (B, ...) with noise of the current evaluation's level, or of the level of each timestep (B,)."""
        if self._step_index is not None or self._begin_index is not None:
            indices = [max(self._step_index or 0, self._start)]
        else:
            indices = [self._index_of(timestep) for timestep in timesteps.flatten()]
        last = self.predictor.sigmas[-1].item()
        levels = [self._evaluations[index].sigma if index < len(self._evaluations) else last for index in indices]
        sigma = torch.tensor(levels, device=original_samples.device).view(-1, *[1] * (original_samples.ndim - 1))
        return self.preconditioning.noised(original_samples.to(working(noise)), noise, sigma).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as the pipelines of flow models call it."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def _current(self, timestep: float | Tensor | None) -> int:
        """The evaluation that is next; the first time, where to begin."""
        if self._step_index is None:
            begin = self._begin_index
            if begin is None:
                begin = 0 if timestep is None else self._index_of(timestep)
                self.set_begin_index(begin)
            self._step_index = begin
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
        calls = [i for level in table.levels for i in level]
        found += [Evaluation(table, i, i == calls[0], i == calls[-1], before) for i in calls]
        before = () if calls else (*before, table)
    return found


def check_fit(predictor: Predictor, preconditioning: Preconditioning, allow: Collection[Difference]) -> None:
    """Raise ValueError unless a predictor's noise levels are such as a network was trained for."""
    first, highest = predictor.sigmas[0].item(), preconditioning.sigma_max
    if preconditioning.is_flow and abs(first - 1) > 1e-6:
        raise ValueError(f"sigmas: from {first} on; valid: from 1 on, a flow network's noise")
    if first > highest * (1 + 1e-3) and "sigmas" not in allow:
        raise ValueError(
            f'sigmas: from {first} on; valid: at most {highest}, what the network was trained for, or allow=["sigmas"]'
        )


def working(sample: Tensor) -> torch.dtype:
    """The precision that states are computed in: single, or double where the pipeline has that."""
    return torch.promote_types(sample.dtype, torch.float32)


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline,
    predictor: Predictor | Path | str,
    prompt: str | Sequence[str],
    generator: torch.Generator | list[torch.Generator] | None = None,
    *,
    negative_prompt: str | Sequence[str] | None = None,
    guidance_scale: float | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    output_type: str = "pil",
    allow: Collection[Difference] = (),
) -> Any:
    """Images of prompts by a predictor, with the points of each step as one batch: `serial_evaluations` calls of the network.

    They are those that the pipeline makes with the predictor's PredictorScheduler, to rounding, for the same generator.

    Args:
        pipe: a StableDiffusionPipeline, StableDiffusion3Pipeline or FluxPipeline, with its weights where it is to run.
        predictor: itself, or its folder.
        prompt: one or several.
        generator: of the noise; a list has one for each image.
        negative_prompt: what guidance leads away from, one for all prompts or one for each; not for FLUX.
        guidance_scale: None is the predictor's own.
        num_images_per_prompt: as in the pipeline; images of the same prompt follow one another.
        height, width: in pixels; None: the model's own.
        output_type: "pil", a list; "np", (B, H, W, C); "pt", (B, C, H, W), in [0, 1]; "latent", the final states.
        allow: what may differ from what the predictor was made for: "backbone", "guidance_scale", "sigmas".

    Raises:
        TypeError: the pipeline is none of these.
        ValueError: the predictor was made for something else; an argument is not as it has to be.
    """
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type: {output_type!r}; valid: pil, np, pt, latent")
    found = predictor if isinstance(predictor, Predictor) else load_predictor(predictor)
    check_pipeline(found, pipe, allow)
    scale = found.guidance_scale if guidance_scale is None else guidance_scale
    found = found.used_for(guidance_scale=scale, allow=allow)
    prompts = repeated([prompt] if isinstance(prompt, str) else list(prompt), num_images_per_prompt)
    backend, scale = backend_of(pipe, height, width, scale)
    check_fit(found, backend.preconditioning, allow)
    negative = None
    if negative_prompt is not None:
        if isinstance(backend, Flux):
            raise ValueError(f"negative_prompt: {negative_prompt!r}; valid: none, FLUX has its guidance embedded")
        single = isinstance(negative_prompt, str)
        negative = [negative_prompt] * len(prompts) if single else repeated(list(negative_prompt), num_images_per_prompt)
        if len(negative) != len(prompts):
            raise ValueError(f"negative_prompt: {len(negative_prompt)}; valid: one, or one for each prompt")
    device = pipe._execution_device
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    noise = randn_tensor((len(prompts), *backend.spec.shape), generator, device, pipe.dtype).to(dtype)
    denoise, _ = counted_denoiser(backend, prompts, scale, negative)
    x = integrate(denoise, found, found.sigmas[0] * noise, found.sigmas)
    images = x if output_type == "latent" else backend.decode(x)
    pipe.maybe_free_model_hooks()
    if output_type in ("pt", "latent"):
        return images
    arrays = pipe.image_processor.pt_to_numpy(images)  # type: ignore[attr-defined]
    return pipe.image_processor.numpy_to_pil(arrays) if output_type == "pil" else arrays  # type: ignore[attr-defined]


Pipelines = StableDiffusion | StableDiffusion3 | Flux


def backend_of(
    pipe: DiffusionPipeline, height: int | None, width: int | None, guidance_scale: float
) -> tuple[Pipelines, float]:
    """The frozen model of a pipeline, and the scale of the guidance that is left to make in two rows."""
    match pipe:
        case StableDiffusionPipeline():
            return StableDiffusion(pipe, height, width), guidance_scale
        case StableDiffusion3Pipeline():
            return StableDiffusion3(pipe, height, width), guidance_scale
        case FluxPipeline():
            return Flux(pipe, height, width, guidance_scale), 1.0
    valid = "StableDiffusionPipeline, StableDiffusion3Pipeline, FluxPipeline"
    raise TypeError(f"pipe: {type(pipe).__name__}; valid: {valid}")


def check_pipeline(predictor: Predictor, pipe: DiffusionPipeline, allow: Collection[Difference]) -> None:
    """Raise ValueError where a predictor was made for a pipeline of another class, or for another model of the hub.

    A local folder has no id of the hub, and is not compared.
    """
    made_for, found = predictor.backbone.pipeline, type(pipe).__name__
    if made_for not in (None, found) and "backbone" not in allow:
        raise ValueError(f'backbone: a {found}; valid: a {made_for}, which the predictor was made for, or allow=["backbone"]')
    name = pipe.name_or_path
    if name and not Path(name).exists():
        predictor.used_for(backbone=name, allow=allow)


def repeated(prompts: list[str], times: int) -> list[str]:
    """Each prompt so many times."""
    return [prompt for prompt in prompts for _ in range(times)]
