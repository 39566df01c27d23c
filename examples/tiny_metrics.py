"""The six preference metrics, tiny, with random weights, in the layout that each is published in."""

from pathlib import Path

from tiny_aesthetic import saved_aesthetic
from tiny_clip import PROJECTION, saved_clip
from tiny_hps import saved_hps
from tiny_image_reward import saved_bert, saved_image_reward
from tiny_mps import saved_clip_h14, saved_mps


def saved_metrics(folder: Path) -> Path:
    """Write every model that conf/metrics names, each in a folder of its name."""
    saved_clip(folder / "clip_l14", 0)
    saved_clip(folder / "pick_score", 1)
    saved_hps(folder / "hps", 2)
    saved_aesthetic(folder / "aesthetic", PROJECTION, 3)
    saved_image_reward(folder / "image_reward", 4)
    saved_bert(folder / "bert")
    saved_mps(folder / "mps", 5)
    saved_clip_h14(folder / "clip_h14")
    return folder
