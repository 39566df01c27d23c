"""Stage backbone: the frozen model, and what it is asked for."""

from functools import partial
from pathlib import Path

import typer

from backends.digits import Digits as DigitsBackend
from solvers import Backbone as Identity
from stages.checkpoint import Checkpoint
from stages.command import command
from stages.files import BACKBONE, atomic
from stages.frozen import PROMPTS, RECORD, UNET, Record, files_of, loading
from stages.params import Backbone, Digits, Pipeline, Weights
from stages.params import Prompts as PromptsParams
from stages.prompts import Prompts, read_prompts, split_prompts
from stages.weights import listed, weights_folder


def backbone(*, seed: int, backbone: Backbone, prompts: PromptsParams) -> None:
    """Train the digits' model and their classifiers, or fetch a pipeline; split the prompts.

    What is fetched comes from the hub (at a pinned revision), from a folder or from a bucket, and stays where this machine
    keeps weights; models/backbone says which ones they are.
    """
    splits = split_prompts(read_prompts(Path(prompts.file)), seed, prompts.validation, prompts.test)
    asked = Prompts(splits, prompts.negative)
    weights = dict[str, Weights]()
    with atomic(BACKBONE) as folder:
        folder.mkdir()
        match backbone:
            case Digits():
                from stages.digits import trained  # scikit-learn takes seconds, which others need not wait for

                trained(seed, backbone, folder)
                identity, settings = DigitsBackend.identity(folder / UNET), {}
            case Pipeline():
                identity, weights["pipeline"] = fetched(backbone, asked)
                settings = backbone.model_dump(include={"height", "width", "dtype"})
        asked.save(folder / PROMPTS.name)
        found = {name: where.model_dump() for name, where in weights.items()}
        Record(backbone.name, identity, settings, found, listed(folder)).save(folder / RECORD.name)
    if isinstance(backbone, Digits):
        Checkpoint("backbone", {"seed": seed, "backbone": backbone}, []).remove()


def fetched(backbone: Pipeline, asked: Prompts) -> tuple[Identity, Weights]:
    """A pipeline, which it is, and with the sha256 that it has. Prompts that it will not see all of are told."""
    weights = Weights(**backbone.model_dump(include=set(Weights.model_fields)))
    folder, found = weights_folder(weights, files_of(backbone.name, backbone.variant), partial(check, backbone))
    from backends.load import FAMILIES, truncated  # diffusers takes seconds: not before it is known what there is

    for split, count in asked.counts.items():
        with loading():
            long = truncated(backbone.name, folder, asked(split, range(count)))
        for tokenizer, (cut, length) in long.items():
            typer.echo(f"{split} prompts: {cut} of {count} are cut to the {length} tokens that {tokenizer} has", err=True)
    revision = backbone.revision if backbone.source == "hub" else found
    identity = Identity(backbone.id, revision, backbone.licence, FAMILIES[backbone.name].pipeline.__name__)
    return identity, weights.model_copy(update={"sha256": found})


def check(backbone: Pipeline, folder: Path) -> None:
    """Raise ValueError unless a folder, with or without its weights, is a pipeline as it is asked for."""
    from backends.load import check_folder

    check_folder(backbone.name, folder, backbone.height, backbone.width)


if __name__ == "__main__":
    command(backbone)
