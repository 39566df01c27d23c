"""Several metrics as one reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from metrics import Metric, Scorer


@dataclass(frozen=True)
class Part:
    """A metric of a mixture: its scores are divided by `divisor`, which makes them about 1 at most, and weighed."""

    scorer: Scorer
    weight: float = 1.0
    divisor: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """A Scorer: the sum of weight * score / divisor over its parts, by the sum of the weights.

    Divisors are the published ones: 1 for HPSv2.1 and CLIP score, 26 for PickScore, 10 for ImageReward and Aesthetic. The
    published reward also cuts each quotient off at 0 and 1; not so here, since all images of a negative ImageReward would be
    equal. A single metric of divisor 1 is its own mixture.
    """

    parts: Mapping[str, Part]

    @classmethod
    def of(cls, metrics: Mapping[str, Metric], weights: Mapping[str, float]) -> "Mixture":
        """Metrics by their weights, divided as their cards say."""
        return cls({name: Part(metric, weights[name], metric.card.divisor) for name, metric in metrics.items()})

    def mixed(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The parts' scores (B,) -> their mixture (B,)."""
        terms = [part.weight / part.divisor * scores[name] for name, part in self.parts.items()]
        return sum(terms[1:], terms[0]) / sum(part.weight for part in self.parts.values())

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.mixed({name: part.scorer(images, prompts) for name, part in self.parts.items()})
