"""The numbers of images, as users write them."""

import re
from itertools import pairwise

MOST_SEEDS = 10_000_000


def parse_seeds(text: str | int) -> list[int]:
    """Numbers and ranges as `0-63,100`, which is 0 to 63 and 100: distinct, in the order given.

    Raises:
        ValueError: it is not of that form, has a seed twice, whose image would count twice, or too many to hold.
    """
    valid, ranges = f"valid: as 0-63,100, up to {MOST_SEEDS:,}", []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*([0-9]{1,12})(?:\s*-\s*([0-9]{1,12}))?\s*", part)
        ends = [int(end) for end in match.groups(default=match[1])] if match else [1, 0]
        if ends[0] > ends[1]:
            raise ValueError(f"found {short(part)} in {short(text)}; {valid}")
        ranges.append(range(ends[0], ends[1] + 1))
    for before, after in pairwise(sorted(ranges, key=lambda seeds: seeds.start)):
        if after.start < before.stop:
            raise ValueError(f"found {after.start} twice in {short(text)}; {valid}, each once")
    if (total := sum(map(len, ranges))) > MOST_SEEDS:
        raise ValueError(f"found {total:,} of them in {short(text)}; {valid}")
    return [seed for seeds in ranges for seed in seeds]


def shown_seeds(seeds: list[int]) -> str:
    """What `parse_seeds` reads as these, in the fewest ranges."""
    starts = [i for i, seed in enumerate(seeds) if i == 0 or seed != seeds[i - 1] + 1]
    runs = [(seeds[start], seeds[end - 1]) for start, end in pairwise([*starts, len(seeds)])]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def short(value: object) -> str:
    """A value for a message, on one line, and not all of it where it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
