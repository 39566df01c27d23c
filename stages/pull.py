"""Pull a published predictor: `python -m stages.pull NAME@VERSION --remote URL [--out FOLDER]`."""

from pathlib import Path
from typing import Annotated

import typer

from solvers.predictor import TENSORS
from stages.files import sha256 as sha256_of
from stages.registry import Registry, RegistryError, parse

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def pull(
    predictor: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="as rdpo@v1.0.0, rdpo@latest, rdpo@prod")],
    remote: Annotated[str, typer.Option(help="s3://BUCKET/PREFIX or file:///FOLDER")],
    out: Annotated[Path | None, typer.Option(help="folder; an older predictor in it is replaced; ./NAME if not given")] = None,
    sha256: Annotated[str | None, typer.Option(help="of the version's record, as publishing printed it")] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="without credentials, from a public bucket")] = False,
) -> None:
    """Fetch a predictor's folder and check it. The environment has credentials, AWS_ENDPOINT_URL."""
    try:
        name, version = parse(predictor)
        folder = out or Path(name)
        version = Registry(remote, anonymous).pull(name, version, folder, sha256)
    except RegistryError as error:
        typer.echo(f"pull: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{name} {version} in {folder} sha256 {sha256_of(folder / TENSORS)}")


if __name__ == "__main__":
    app()
