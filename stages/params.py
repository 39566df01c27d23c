"""What params.yaml may say. It is composed from conf/, where every knob is explained; here stand types and ranges."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from yaml import YAMLError

from stages.seeds import parse_seeds

PARAMS = Path("params.yaml")

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rho = Annotated[float, Field(ge=0.1, le=100)]
Name = Annotated[str, Field(pattern="^[a-z0-9_]+$")]
Nodes = Annotated[int, Field(ge=2)]


class Section(BaseModel):
    """A group of parameters: none unknown, none missing, no silent conversion, none changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _has_no_unknown_keys(cls, values: Any) -> Any:
        unknown = sorted(map(str, set(values) - set(cls.model_fields))) if isinstance(values, dict) else []
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}; valid: {', '.join(cls.model_fields)}")
        return values


class Batched(Section):
    """A section whose batch size says how many images are made at a time, and decides no more of them than their last bits."""

    batch_size: Count

    @property
    def least_batch_size(self) -> int:
        """With which the stage still runs."""
        return 1

    def capped(self, most: int) -> Self:
        """The same with a batch size of at most so many, or else of the least."""
        return self.model_copy(update={"batch_size": min(self.batch_size, max(most, self.least_batch_size))})


class Compute(Section):
    """What changes the speed and the memory, not what is computed (but for the last bits)."""

    device: Literal["auto", "cpu", "cuda"]
    offload: bool
    slicing: bool
    drop_text_encoders: bool


Stage = Literal["backbone", "metrics", "refs", "teacher", "distill", "rdpo", "sample", "evaluate", "report"]


class Flows(Section):
    """How flows run the stages."""

    gpu_stages: list[Stage]
    hours: dict[Stage, Annotated[float, Field(gt=0, allow_inf_nan=False)]]


class Polynomial(Section):
    name: Literal["polynomial"]
    rho: Rho


class LogSNR(Section):
    name: Literal["logsnr"]
    rho: None = None  # so that a composition can take away another schedule's


class TimeUniform(Section):
    name: Literal["time_uniform"]
    rho: Rho


class Discrete(Section):
    name: Literal["discrete"]
    rho: Rho


class FlowMatch(Section):
    name: Literal["flowmatch"]
    rho: None = None


Schedule = Annotated[Polynomial | LogSNR | TimeUniform | Discrete | FlowMatch, Field(discriminator="name")]


class Weights(Section):
    """Where a frozen model's files come from."""

    source: Annotated[str, Field(min_length=1)]
    id: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    variant: Name | None

    @model_validator(mode="after")
    def _is_pinned(self) -> "Weights":
        if self.source == "hub" and self.revision is None:
            raise ValueError("revision: found None; valid: 40 hexadecimal digits, the commit of the hub's repository")
        return self


class Digits(Section):
    name: Literal["digits"]
    held_out: Annotated[int, Field(ge=100, le=1000)]
    channels: Annotated[int, Field(ge=8, multiple_of=8)]
    iterations: Count
    batch_size: Count
    learning_rate: Positive
    label_dropout: Fraction
    ema_decay: Fraction
    checkpoint_every: Count
    classifier_iterations: Count
    label_smoothing: Fraction


class Pipeline(Weights):
    name: Literal["sd15", "sd3", "flux"]
    licence: Annotated[str, Field(min_length=1)]
    height: Count
    width: Count
    dtype: Literal["float32", "float16", "bfloat16"]


Backbone = Annotated[Digits | Pipeline, Field(discriminator="name")]


class Prompts(Section):
    file: Annotated[str, Field(min_length=1)]
    validation: Count | None
    test: Count | None
    negative: str

    @model_validator(mode="after")
    def _has_both_numbers_or_none(self) -> "Prompts":
        if (self.validation is None) != (self.test is None):
            raise ValueError(f"validation, test: found {self.validation}, {self.test}; valid: two numbers, or null twice")
        return self


DigitsMetric = Literal["log_probability", "accuracy"]
ImageMetric = Literal["hps", "pick_score", "image_reward", "clip_score", "aesthetic", "mps"]
Model = Literal["hps", "pick_score", "image_reward", "bert", "clip_l14", "aesthetic", "mps", "clip_h14", "inception"]
MODELS: dict[str, tuple[Model, ...]] = {
    "hps": ("hps",),
    "pick_score": ("pick_score",),
    "image_reward": ("image_reward", "bert"),
    "clip_score": ("clip_l14",),
    "aesthetic": ("aesthetic", "clip_l14"),
    "mps": ("mps", "clip_h14"),
    "clip_l14": ("clip_l14",),
    "inception": ("inception",),
}
"""What each metric of images, and each kind of features, is made of. What two share is loaded once."""
WEIGHTLESS = {"bert", "clip_h14"}
"""Models that only a configuration and a tokenizer are taken of."""
INCEPTION = 2048
"""Features, and so the fewest images of which a Frechet distance in them says anything."""


class Metrics(Section):
    reward: dict[DigitsMetric | ImageMetric, NotNegative]
    judges: Annotated[list[DigitsMetric | ImageMetric], Field(min_length=1)]
    features: Literal["accuracy", "clip_l14", "inception"]
    dtype: Literal["float32", "float16", "bfloat16"]
    weights: dict[Model, Weights]

    @property
    def rewarded(self) -> dict[str, float]:
        """What the reward is made of, by its weights."""
        return {name: weight for name, weight in self.reward.items() if weight}

    @property
    def names(self) -> list[str]:
        """The metrics that are computed."""
        return [*self.rewarded, *self.judges]

    @model_validator(mode="after")
    def _has_judges_that_are_not_the_reward(self) -> "Metrics":
        if not self.rewarded:
            raise ValueError(f"reward: found {self.reward}; valid: a weight above 0 for one metric or more")
        if twice := sorted({name for name in self.judges if self.judges.count(name) > 1}):
            raise ValueError(f"judges: found {', '.join(twice)} twice; valid: each once")
        if both := [name for name in self.judges if name in self.rewarded]:
            raise ValueError(f"judges: found {self.judges}; valid: without {', '.join(both)}, which the reward is made of")
        self._has_weights_of_what_is_used()
        of_reward = {model: name for name in self.rewarded for model in MODELS.get(name, (name,)) if model not in WEIGHTLESS}
        others: dict[str, Weights] = {**self.weights}
        for path, name in [("features", self.features), *(("judges", name) for name in self.judges)]:
            for model in MODELS.get(name, (name,)):
                if model in of_reward:
                    shared = f"of which {model} is what the reward's {of_reward[model]} is made of, too"
                    raise ValueError(f"{path}: found {name}, {shared}; valid: what shares no weights with the reward")
                if same := [reward for reward in of_reward if reward in others and others[reward] == others.get(model)]:
                    raise ValueError(f"weights: found the reward's, {same[0]}, for {model}; valid: weights of its own")
        return self

    def _has_weights_of_what_is_used(self) -> None:
        used = {model for name in [*self.names, self.features] for model in MODELS.get(name, ())}
        if lacking := sorted(used - set(self.weights)):
            found = f"found those of {', '.join(sorted(self.weights)) or 'nothing'}"
            raise ValueError(f"weights: {found}; valid: also of {', '.join(lacking)}, which is in use")


MultistepName = Literal[
    "ipndm_1", "ipndm_2", "ipndm_3", "ipndm_4",
    "adams_bashforth_1", "adams_bashforth_2", "adams_bashforth_3", "adams_bashforth_4",
    "deis_1", "deis_2", "deis_3", "deis_4", "deis_log_2", "deis_log_3",
    "dpm_solver_pp_1m", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "dpm_solver_pp_3m_corrected",
    "dpm_solver_1m", "dpm_solver_2m", "dpm_solver_3m", "dpm_solver_3m_corrected",
]  # fmt: skip
DeterministicName = Literal[
    "euler", "heun", "midpoint", "rk4", "dpm_solver_2", MultistepName,
    "unipc_1", "unipc_2", "unipc_3", "unipc_bh1_1", "unipc_bh1_2", "unipc_bh1_3",
    "unipc_noise_1", "unipc_noise_2", "unipc_noise_3",
]  # fmt: skip
SolverName = Literal[DeterministicName, "ddpm"]
EVALUATIONS = {"heun": 2, "midpoint": 2, "dpm_solver_2": 2, "rk4": 4}
"""Serial evaluations per step of the solvers that make more than one."""


class Teacher(Batched):
    solver: DeterministicName
    extra_nodes: Annotated[int, Field(ge=0)]
    train: Count
    validation: Count


class Learning(Section):
    """What all families that learn by gradient descent have."""

    learning_rate: Positive
    iterations: Count
    batch_size: Count
    validate_every: Count
    ema_decay: Fraction
    checkpoint_calls: bool


class EPD(Learning):
    family: Literal["epd"]
    points: Count
    scale_dir: Fraction
    scale_time: Fraction
    loss: Literal["end", "nodes", "features"]


class EPDPlugin(Learning):
    family: Literal["epd_plugin"]
    max_order: Annotated[int, Field(ge=2, le=4)]
    points: Count
    scale_dir: Fraction
    scale_time: Fraction
    loss: Literal["end", "nodes", "features"]


class AMED(Learning):
    family: Literal["amed"]
    scale_dir: Fraction
    scale_time: Fraction
    loss: Literal["end", "nodes", "features"]


class S4S(Learning):
    family: Literal["s4s"]
    start: MultistepName
    history: Count
    scale_time: Fraction
    radius: NotNegative
    loss: Literal["end", "nodes", "features"]


class S4SAlt(Learning):
    family: Literal["s4s_alt"]
    start: MultistepName
    history: Count
    scale_time: Fraction
    radius: NotNegative
    rounds: Count
    grid_learning_rate: Positive
    loss: Literal["end", "features"]

    @model_validator(mode="after")
    def _has_turns_of_an_iteration_or_more(self) -> "S4SAlt":
        if 2 * self.rounds > self.iterations:
            raise ValueError(f"rounds: found {self.rounds}; valid: at most half the iterations, {self.iterations // 2}")
        return self


class ParallelMultistep(Learning):
    family: Literal["parallel_multistep"]
    start: MultistepName
    points: Count
    history: Count
    scale_time: Fraction
    grid_learning_rate: Positive
    loss: Literal["end", "features"]


class DODE(Section):
    family: Literal["d_ode"]
    batch_size: Count


Distill = Annotated[EPD | EPDPlugin | AMED | S4S | S4SAlt | ParallelMultistep | DODE, Field(discriminator="family")]


Std = Annotated[float, Field(ge=0, le=1)]


class RDPO(Batched):
    method: Literal["rdpo", "reward_gradient", "cma_es"]
    group: Literal["shared", "prompt", "mixed"]
    draws: Literal["independent", "sobol"]
    groups: Count
    tables: Annotated[int, Field(ge=2)]
    concentration: Annotated[float, Field(ge=1, le=1e9)]
    direction_std: Std
    time_std: Std
    coefficient_std: Std
    node_std: Std
    hidden: Count
    blocks: Count
    learning_rate: Positive
    warmup: Annotated[int, Field(ge=0)]
    clip: Annotated[float, Field(gt=0, lt=1)]
    epochs: Count
    minibatch: Count | None
    kl: NotNegative
    entropy: NotNegative
    iterations: Count
    validation: Annotated[int, Field(ge=100)]
    validate_every: Count
    patience: Count | None
    kl_alarm: Positive | None
    kl_limit: Positive | None
    checkpoint_every: Count
    checkpoint_minutes: Positive

    @property
    def least_batch_size(self) -> int:
        return self.tables

    def ranks(self, most: int) -> int:
        """The largest number of them, up to `most`, that the groups can be split among."""
        return max(size for size in range(1, min(most, self.groups) + 1) if self.groups % size == 0)

    @model_validator(mode="after")
    def _has_deviations_in_the_range_that_is_learned(self) -> "RDPO":
        for name in ("direction_std", "time_std", "coefficient_std", "node_std"):
            if 0 < getattr(self, name) < 1e-3:
                raise ValueError(f"{name}: found {getattr(self, name)}; valid: 0, or 0.001 to 1")
        return self

    @model_validator(mode="after")
    def _has_tables_for_its_method(self) -> "RDPO":
        if self.batch_size < self.tables:
            raise ValueError(f"batch_size: found {self.batch_size}; valid: {self.tables} or more, the tables of a group")
        if self.method == "cma_es" and self.tables < 4:
            raise ValueError(f"tables: found {self.tables}; valid: 4 or more, for cma_es, whose generation they are")
        if self.minibatch is not None and self.groups * self.tables % self.minibatch:
            rollouts = self.groups * self.tables
            raise ValueError(f"minibatch: found {self.minibatch}; valid: null, or what divides groups * tables, {rollouts}")
        return self


class Classical(Section):
    solver: SolverName
    model: Literal["models/backbone"]
    schedule: Schedule
    afs: bool | None
    num_steps: Nodes | None


class Learned(Section):
    solver: Literal["predictor"]
    model: Literal["models/distilled", "models/rdpo"]


Sampler = Annotated[Classical | Learned, Field(discriminator="solver")]


def _seeds(seeds: str | int) -> str | int:
    if len(parse_seeds(seeds)) < 2:  # nothing that is reported could have an uncertainty
        raise ValueError(f"found {seeds!r}, one image; valid: two or more, as 0-63,100")
    return seeds


class Sample(Batched):
    seeds: Annotated[str | int, AfterValidator(_seeds)]


class RealImages(Section):
    source: Literal["data"]


class OtherImages(Batched):
    source: Literal["reference", "zip", "folder", "dataset", "statistics"]
    path: Annotated[str, Field(min_length=1)] | None
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None
    split: Name | None
    column: str | None
    size: Count | None
    images: Annotated[int, Field(ge=2)] | None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None

    @model_validator(mode="after")
    def _has_what_its_source_needs(self) -> "OtherImages":
        if (self.path is None) != (self.source == "reference"):
            valid = "null, for the model's own images" if self.path else f"where the {self.source} is"
            raise ValueError(f"path: found {self.path!r}; valid: {valid}")
        if self.images is None and self.source in ("reference", "statistics"):
            raise ValueError(f"images: found None; valid: how many, for {self.source}")
        of_images = {"size": self.size} if self.source in ("reference", "statistics") else {}
        of_dataset = {} if self.source == "dataset" else {"revision": self.revision, "split": self.split, "column": self.column}
        if odd := {name: value for name, value in (of_images | of_dataset).items() if value is not None}:
            raise ValueError(f"{', '.join(odd)}: found {odd}; valid: null, for {self.source}")
        return self


Refs = Annotated[RealImages | OtherImages, Field(discriminator="source")]


class Evaluate(Batched):
    pictures: Annotated[int, Field(ge=1, le=100)]
    ranges: Annotated[int, Field(ge=1, le=10)]


class Report(Section):
    base: Name


class Params(Section):
    """The whole of params.yaml."""

    seed: Annotated[int, Field(ge=0)]
    num_steps: Nodes
    afs: bool
    guidance_scale: NotNegative
    compute: Compute
    flows: Flows
    schedule: Schedule
    backbone: Backbone
    prompts: Prompts
    metrics: Metrics
    refs: Refs
    teacher: Teacher
    distill: Distill
    rdpo: RDPO
    samplers: dict[Name, Sampler]
    sample: Sample
    evaluate: Evaluate
    report: Report

    @model_validator(mode="after")
    def _fits_the_backbone(self) -> "Params":
        """Schedules, analytic first steps and metrics that other kinds of models have."""
        name, flow = self.backbone.name, self.backbone.name in ("sd3", "flux")
        classical = {f"samplers.{key}.": s for key, s in self.samplers.items() if isinstance(s, Classical)}
        for path, schedule in {"": self.schedule, **{path: sampler.schedule for path, sampler in classical.items()}}.items():
            own = {"discrete": name == "sd15", "flowmatch": flow}
            if not own.get(schedule.name, True):
                raise ValueError(f"{path}schedule.name: found {schedule.name!r}; valid: another, for the backbone {name}")
        for path, afs in {"": self.afs, **{path: sampler.afs for path, sampler in classical.items()}}.items():
            if flow and afs is not False:
                raise ValueError(f"{path}afs: found {afs}; valid: False, for a flow model, whose first state is noise alone")
        digits = name == "digits"
        metrics = [*self.metrics.names, self.metrics.features]
        wrong = [metric for metric in metrics if (metric in get_args(DigitsMetric)) != digits]
        if wrong or digits != isinstance(self.refs, RealImages):
            found = ", ".join([*wrong, f"refs.source {self.refs.source}"])
            raise ValueError(f"metrics: found {found}; valid: those of conf/backbone for {name}")
        if not digits and isinstance(self.distill, AMED):
            raise ValueError(f"distill.family: found 'amed', which needs a network's features; valid: another, for {name}")
        if name == "flux" and self.prompts.negative:
            raise ValueError(
                f"prompts.negative: found {self.prompts.negative!r}; valid: '', for flux, whose guidance is embedded"
            )
        if not digits and not isinstance(self.distill, DODE) and self.distill.loss == "features":
            raise ValueError(f"distill.loss: found 'features'; valid: 'end' or 'nodes', for the backbone {name}")
        return self

    @model_validator(mode="after")
    def _has_images_for_its_distances(self) -> "Params":
        seeds, ranges = len(parse_seeds(self.sample.seeds)), self.evaluate.ranges
        if seeds % ranges:
            raise ValueError(f"evaluate.ranges: found {ranges} for {seeds} images; valid: what divides them")
        counts = {"sample.seeds": seeds // ranges, "rdpo.validation": self.rdpo.validation}
        if isinstance(self.refs, OtherImages) and self.refs.images is not None:
            counts["refs.images"] = self.refs.images
        for path, count in counts.items() if self.metrics.features == "inception" else ():
            if count < INCEPTION:
                raise ValueError(f"{path}: found {count} images; valid: {INCEPTION} or more, for metrics.features inception")
        return self

    @model_validator(mode="after")
    def _has_a_grid_of_its_own_for_the_reference(self) -> "Params":
        reference = self.samplers.get("reference")
        if isinstance(reference, Classical) and reference.num_steps is None:
            raise ValueError("samplers.reference.num_steps: found None; valid: a number, many times that of the others")
        return self

    @model_validator(mode="after")
    def _samplers_can_match_the_serial_evaluations(self) -> "Params":
        budget = serial_evaluations(self.num_steps, self.afs, self.distill)
        if budget < 1:
            raise ValueError(f"num_steps: found {self.num_steps}; valid: 3 or more with afs, or all would be analytic")
        for name, sampler in self.samplers.items():
            if not isinstance(sampler, Classical) or sampler.num_steps is not None:
                continue
            if classical_nodes(sampler, budget) is None:
                per_step = EVALUATIONS.get(sampler.solver, 1)
                raise ValueError(
                    f"samplers.{name}: {sampler.solver} makes {per_step} evaluations per step, with afs {sampler.afs} never "
                    f"the learned table's {budget}; valid: another afs, null for what fits, or a num_steps of its own"
                )
        return self

    @model_validator(mode="after")
    def _has_steps_for_its_history(self) -> "Params":
        if isinstance(self.distill, S4S | S4SAlt | ParallelMultistep):
            steps, needed = self.num_steps - 1, max(1, int(re.sub(r"\D", "", self.distill.start)) - 1)
            if not needed <= self.distill.history <= steps:
                valid = f"{needed}, for {self.distill.start}, to {steps}, the steps of num_steps {self.num_steps}"
                raise ValueError(f"distill.history: found {self.distill.history}; valid: {valid}")
        return self

    @model_validator(mode="after")
    def _has_something_to_draw(self) -> "Params":
        """Multistep tables have neither Dirichlets nor direction scales."""
        ahead = isinstance(self.distill, ParallelMultistep) and self.distill.points > 1
        multistep = isinstance(self.distill, S4S | S4SAlt | ParallelMultistep | DODE)
        if multistep and not (self.rdpo.coefficient_std or self.rdpo.time_std or (ahead and self.rdpo.node_std)):
            names = "rdpo.coefficient_std, rdpo.time_std" + (", rdpo.node_std" if ahead else "")
            raise ValueError(f"{names}: found 0; valid: one above 0, or there is nothing to draw of {self.distill.family}")
        return self

    @model_validator(mode="after")
    def _has_the_compared_samplers(self) -> "Params":
        missing = sorted({"reference", "distilled", "rdpo"} - set(self.samplers))
        if missing:
            raise ValueError(f"samplers: no {', '.join(missing)}; valid: with it, since the others are compared with these")
        for name in ("distilled", "rdpo"):
            sampler = self.samplers[name]
            if not isinstance(sampler, Learned) or sampler.model != f"models/{name}":
                raise ValueError(f"samplers.{name}: {sampler!r}; valid: solver: predictor, model: models/{name}")
        if self.report.base not in self.samplers:
            raise ValueError(f"report.base: found {self.report.base!r}; valid: {', '.join(self.samplers)}")
        return self


def serial_evaluations(num_steps: int, afs: bool, distill: Distill) -> int:
    """Of the learned table: two per interval where it goes from the node to points inside, else one; less the analytic one."""
    per_step = 2 if isinstance(distill, EPD | EPDPlugin | AMED) else 1
    return per_step * (num_steps - 1) - afs


def classical_nodes(sampler: Classical, serial: int) -> tuple[int, bool] | None:
    """Nodes of the grid, and whether the first step is analytic, by which a solver makes so many evaluations; None: neither."""
    for afs in (True, False) if sampler.afs is None else (sampler.afs,):
        if sampler.num_steps is not None:
            return sampler.num_steps, afs
        steps, rest = divmod(serial + afs, EVALUATIONS.get(sampler.solver, 1))
        if steps and not rest:
            return steps + 1, afs
    return None


class ParamsError(Exception):
    """params.yaml says something that it may not."""


def load_params(path: Path = PARAMS) -> Params:
    """Read and validate the whole of params.yaml.

    Raises:
        ParamsError: a line for each wrong value, with its path, what was found and what would be valid.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise ParamsError(f"{path}: missing; valid: run where params.yaml lies, the top of the repository") from None
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise ParamsError(f"{path}: not YAML: {error}") from error
    try:
        return Params.model_validate(found)
    except ValidationError as error:
        lines = [f"{path}: {_explain(found, detail)}" for detail in error.errors()]
        raise ParamsError("\n".join(lines)) from None


def _explain(found: Any, detail: ErrorDetails) -> str:
    """One of pydantic's errors as: path: what was found; valid: what would be."""
    path: list[str] = []
    for key in detail["loc"]:
        if isinstance(found, dict) and key in found:
            found = found[key]
            path.append(str(key))
    match detail["type"]:
        case "missing":
            return f"{'.'.join([*path, str(detail['loc'][-1])])}: missing; valid: a value, as explained in conf/"
        case "value_error":
            return ": ".join([*filter(None, [".".join(path)]), detail["msg"].removeprefix("Value error, ")])
        case "union_tag_not_found":
            key = detail.get("ctx", {})["discriminator"].strip("'")
            return f"{'.'.join([*path, key])}: missing; valid: one of those that conf/ explains"
        case "union_tag_invalid":
            context = detail.get("ctx", {})
            path.append(context["discriminator"].strip("'"))
            found, valid = context["tag"], context["expected_tags"]
        case _:
            valid = detail["msg"].removeprefix("Input should be ")
    return f"{'.'.join(path)}: found {found!r}; valid: {valid}"


if __name__ == "__main__":
    try:
        load_params()
    except ParamsError as error:
        raise SystemExit(str(error)) from None
