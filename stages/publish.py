"""Publish a predictor: `python -m stages.publish FOLDER NAME@VERSION --remote URL [--stage prod]`."""

from pathlib import Path
from typing import Annotated

import typer

from stages.registry import Registry, RegistryError, parse

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="of the predictor, as models/rdpo")],
    predictor: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="as rdpo@v1.0.0")],
    remote: Annotated[str, typer.Option(help="s3://BUCKET/PREFIX or file:///FOLDER")],
    stage: Annotated[str | None, typer.Option(help="that stands for this version from now on, as prod")] = None,
) -> None:
    """Publish a predictor's folder under a version, which never changes. The environment has credentials, AWS_ENDPOINT_URL."""
    try:
        name, version = parse(predictor)
        registry = Registry(remote)
        sha256 = registry.publish(folder, name, version, stage)
    except RegistryError as error:
        typer.echo(f"publish: {error}", err=True)
        raise typer.Exit(1) from None
    assigned = f" stage {stage}" if stage else ""
    typer.echo(f"{name} {version} published at {registry.remote.url}{assigned} sha256 {sha256}")


if __name__ == "__main__":
    app()
