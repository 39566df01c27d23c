"""Stage metrics: which metrics score images, and which weights they have."""

from stages.command import command
from stages.fetch import metric_files
from stages.files import METRICS
from stages.params import MODELS, Metrics, Model, Weights
from stages.scorers import Chosen
from stages.weights import weights_folder


def metrics(*, metrics: Metrics) -> None:
    """Fetch the models of the metrics that are in use, and write down which ones they are.

    They come from the hub (at a pinned revision), from a folder or from a bucket, and stay where this machine keeps weights.
    The digits' classifiers are trained by stage backbone.
    """
    used: set[Model] = {model for name in [*metrics.names, metrics.features] for model in MODELS.get(name, ())}
    weights = {model: pinned(model, metrics.weights[model]).model_dump() for model in sorted(used)}
    Chosen(metrics.rewarded, [*metrics.judges], metrics.features, metrics.dtype, weights).save(METRICS)


def pinned(model: str, weights: Weights) -> Weights:
    """A model, fetched, with the sha256 that it has."""
    _, found = weights_folder(weights, lambda files, place: metric_files(model, files, weights.variant, place), lambda _: None)
    return weights.model_copy(update={"sha256": found})


if __name__ == "__main__":
    command(metrics)
