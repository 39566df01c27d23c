"""Sends the outputs of a stage that dvc.yaml marks `cache: false` to a remote: `python -m flows.uncached STAGE REMOTE`.

DVC keeps them in its cache, as parts of what a run made, and `dvc repro --pull` restores a run only if it finds them all. But
`dvc push` leaves them out.
"""

import sys

from dvc.repo import Repo


def push(stage: str, remote: str) -> None:
    """Of the repository in the working directory."""
    with Repo() as repo:
        (found,) = repo.stage.collect(stage)
        hashes = {out.hash_info for out in found.outs if not out.use_cache and out.hash_info}
        if hashes:
            repo.cloud.push(hashes, remote=remote)


if __name__ == "__main__":
    push(*sys.argv[1:])
