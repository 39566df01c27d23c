"""What stage evaluate found out about the samplers, as stage report reads it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyarrow.parquet import ParquetFile
from torch import Tensor

from stages.files import RESULTS, SCORES, read_tensors, reading, require
from stages.params import Metrics

WATCHED = ("brightness", "saturation")
DISTANCES = ("frechet_distance", "distance_to_reference")
INFLUENCE = "_influence"
ERROR = "_se"


@dataclass(frozen=True)
class Quantity:
    """A column of the table: its key in the files, its name, and its decimals."""

    key: str
    name: str
    digits: int


@dataclass(frozen=True)
class Result:
    """What is known of one sampler.

    Attributes:
        serial, total: evaluations of the network per image.
        found: by key, a value and its standard error.
        protocol, metrics: records of how the distances come about, and of the metrics in the order of their columns; the same
            for all samplers.
        samples, prompts: of each image, (n,).
        scores: by key, (n,), float64.
        influences: by key, (n,): by how much each image moves a distance or the RMSE, to first order, times n.
        pictures: of the first prompts, uint8 (P, C, H, W).
    """

    serial: int
    total: float
    found: dict[str, tuple[float, float]]
    protocol: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    samples: list[int]
    prompts: list[str]
    scores: dict[str, Tensor]
    influences: dict[str, Tensor]
    pictures: Tensor

    @property
    def label(self) -> str:
        """The name of the Frechet distance, which says of how many images it is."""
        return self.protocol[0]["label"]

    @property
    def rewarded(self) -> list[dict[str, Any]]:
        """The records of the metrics in the reward."""
        return [record for record in self.metrics if record["in_reward"]]

    @property
    def judges(self) -> list[str]:
        """The metrics that are not in the reward."""
        return [record["name"] for record in self.metrics if not record["in_reward"]]

    @property
    def mixed(self) -> bool:
        """Whether the reward is another number than that of a metric."""
        return len(self.rewarded) > 1 or self.rewarded[0]["divisor"] != 1

    @property
    def scored(self) -> dict[str, str]:
        """What there is for every prompt, by its names in the tables: metrics, their mixture, and what is watched."""
        rewarded = {record["name"]: f"{record['name']} (reward)" for record in self.rewarded}
        names = {record["name"]: record["name"] for record in self.metrics} | rewarded
        return {**names, **({"reward": "reward"} if self.mixed else {}), **{name: name for name in WATCHED}}

    @property
    def quantities(self) -> list[Quantity]:
        """The table's columns after the costs."""
        of_features = [
            Quantity("kernel_distance", "KID", 4),
            Quantity("precision", "precision", 3),
            Quantity("recall", "recall", 3),
        ]
        return [
            Quantity("frechet_distance", self.label, 2),
            Quantity("distance_to_reference", "FD to reference", 3),
            *(quantity for quantity in of_features if quantity.key in self.found),
            Quantity("rmse", "RMSE", 4),
            *(Quantity(key, name, 4) for key, name in self.scored.items()),
        ]


def read(samplers: Sequence[str], metrics: Metrics) -> dict[str, Result]:
    """What is known of each sampler.

    Raises:
        InputError: a file is missing, not what it has to be, or of other samples, prompts or metrics than the first sampler's.
    """
    results = {name: result_of(name) for name in samplers}
    first = results[samplers[0]]
    for name, result in results.items():
        with reading(SCORES / f"{name}.parquet") as file:
            require(file, "prompts", len(result.prompts), len(first.prompts))
            for i, found in enumerate(zip(result.samples, result.prompts, strict=True)):
                require(file, f"sample and prompt of row {i}", found, (first.samples[i], first.prompts[i]))
            for key in result.scored:
                require(file, f"scores by {key}", len(result.scores[key]), len(first.prompts))
        with reading(RESULTS / f"{name}.json") as file:
            rewarded = {record["name"]: record["weight"] for record in result.rewarded}
            require(file, "metrics of the reward by their weights", rewarded, metrics.rewarded)
            if (result.protocol, result.metrics) != (first.protocol, first.metrics):
                raise ValueError(f"{file}: protocol or metrics others than in {samplers[0]}.json; valid: the same")
            for quantity in result.quantities:
                require(file, quantity.key, len(result.found[quantity.key]), 2)
    return results


def result_of(name: str) -> Result:
    """What the files of one sampler say."""
    with reading(SCORES / f"{name}.parquet") as file:
        table = ParquetFile(file).read()
        columns = {key: table.column(key).to_pylist() for key in table.column_names}
        samples, prompts = columns.pop("sample"), columns.pop("prompt")
        scores = {key: torch.tensor(values, dtype=torch.float64) for key, values in columns.items()}
        influences = {key: scores.pop(f"{key}{INFLUENCE}") for key in DISTANCES}
        squared = scores["squared_error"]
        influences["rmse"] = (squared - squared.mean()) / (2 * squared.mean().sqrt()).clamp_min(1e-12)  # the reference's is 0
    with reading(SCORES / f"{name}.safetensors") as file:
        tensors, _ = read_tensors(file)
        pictures = tensors["pictures"]
    with reading(RESULTS / f"{name}.json") as file:
        result = json.loads(file.read_text())
        require(file, "n", result["n"], len(prompts))
        keys = [key.removesuffix(ERROR) for key in result if key.endswith(ERROR)]
        return Result(
            serial=result["serial_evaluations"],
            total=result["total_evaluations"],
            found={key: (result[key], result[f"{key}{ERROR}"]) for key in keys},
            protocol=[{key: value for key, value in record.items() if key != "distances"} for record in result["protocol"]],
            metrics=result["metrics"],
            samples=samples,
            prompts=prompts,
            scores=scores,
            influences=influences,
            pictures=pictures,
        )
