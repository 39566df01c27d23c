"""Sends the outputs of a stage that dvc.yaml marks `cache: false` to a remote: `python -m flows.uncached STAGE REMOTE`.

Those that are metrics or plots DVC keeps in its cache, as parts of what a run made, and `dvc repro --pull` restores a run only
if it finds them all. But `dvc push` leaves them out.
"""

import sys

from dvc.repo import Repo, lock_repo


def push(stage: str, remote: str) -> None:
    """Of the repository in the working directory."""
    with Repo(_wait_for_lock=True) as repo:
        with lock_repo(repo):  # else another stage may just be writing dvc.lock
            (found,) = repo.stage.collect(stage)
            left_out = [out.hash_info for out in found.outs if not out.use_cache]
            hashes = {each for each in left_out if each and repo.cache.local.exists(str(each.value))}
        if hashes:
            repo.cloud.push(hashes, remote=remote)


if __name__ == "__main__":
    push(*sys.argv[1:])
