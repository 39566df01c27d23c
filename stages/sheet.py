"""A page of many pictures, to be looked at."""

import math

from PIL import Image
from PIL.Image import Image as Picture
from PIL.Image import Resampling

WIDTH, MAGNIFIED = 1000, 96
"""Pixels of a page's width, and of the longer side of a picture that is magnified, at most."""
GAP = 4
"""Pixels between pictures."""
PAPER = "gray"


class Sheet:
    """Pictures of one size on a page that is about as high as it is wide.

    Those of a group stand beside each other, in lines of their own where they need more than one. Small pictures are magnified
    by a whole number, large ones are shrunk.

    Args:
        groups: how many there are.
        each: pictures of each.
    """

    def __init__(self, groups: int, each: int) -> None:
        root = math.ceil(math.sqrt(groups * each))
        self.each, self.wide = each, min(each, root)
        self.high = math.ceil(each / self.wide)  # of a group, in pictures
        self.abreast = min(root // self.wide, groups)  # groups
        self.columns, self.rows = self.abreast * self.wide, math.ceil(groups / self.abreast) * self.high
        self.room = max(1, (WIDTH - GAP) // self.columns - GAP)
        self.pictures: list[Picture] = []

    def add(self, picture: Picture) -> None:
        """Take the next picture, group by group."""
        width, height = picture.size
        times = max(1, min(MAGNIFIED, self.room) // max(width, height))
        if width * times <= self.room:
            shown = picture.resize((width * times, height * times), Resampling.NEAREST)
        else:
            shown = picture.resize((self.room, max(1, round(height * self.room / width))), Resampling.LANCZOS)
        self.pictures.append(shown)

    def page(self) -> Picture:
        """All that were taken."""
        width, height = (side + GAP for side in self.pictures[0].size)
        found = Image.new(self.pictures[0].mode, (self.columns * width + GAP, self.rows * height + GAP), PAPER)
        for index, picture in enumerate(self.pictures):
            group, position = divmod(index, self.each)
            line, column = divmod(position, self.wide)
            row, place = divmod(group, self.abreast)
            found.paste(picture, (GAP + (place * self.wide + column) * width, GAP + (row * self.high + line) * height))
        return found
