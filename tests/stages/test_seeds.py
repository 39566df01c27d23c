import random
import re

import pytest

from stages.seeds import MOST_SEEDS, parse_seeds


@pytest.mark.parametrize("seed", range(50))
def test_seeds_are_those_of_their_parts_in_order(seed: int) -> None:
    draw = random.Random(seed)
    ends = sorted(draw.sample(range(draw.choice([100, 10_000])), 2 * draw.randint(1, 12)))
    pairs = [(first, draw.choice([first, last])) for first, last in zip(ends[::2], ends[1::2], strict=True)]
    draw.shuffle(pairs)
    space = draw.choice(["", " "])
    parts = [str(a) if a == b and draw.random() < 0.5 else f"{a}{space}-{space}{b}" for a, b in pairs]
    expected = []
    for first, last in pairs:
        while first <= last:
            expected.append(first)
            first += 1
    assert parse_seeds(f",{space}".join(parts)) == expected


@pytest.mark.parametrize("seed", range(50))
def test_seeds_of_overlapping_ranges_are_refused_wherever_they_stand(seed: int) -> None:
    draw = random.Random(seed)
    pairs = [tuple(sorted(draw.choices(range(60), k=2))) for _ in range(draw.randint(2, 5))]
    expected = [number for first, last in pairs for number in range(first, last + 1)]
    text = ",".join(f"{first}-{last}" for first, last in pairs)
    if len(set(expected)) == len(expected):
        assert parse_seeds(text) == expected
        return
    with pytest.raises(ValueError, match=r"found (\d+) twice in ") as error:
        parse_seeds(text)
    found = re.search(r"found (\d+)", str(error.value))
    assert found
    assert expected.count(int(found[1])) > 1


def test_a_number_is_itself() -> None:
    for number in (0, 7, 10**11):
        assert parse_seeds(number) == parse_seeds(str(number)) == [number]
    assert parse_seeds("0-63,100") == [*range(64), 100]


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            " ",
            ",",
            "1,",
            ",1",
            "1,,2",
            "-1",
            "1--3",
            "-1-3",
            "9-3",
            "1-",
            "1-2-3",
            "1:3",
            "0x10",
            "1e3",
            "1.0",
            "1;2",
            "1 2",
        ],
        *["a", "a-b", "None", "٣", "²", "1\n2", "5,9-3,7", -1, True, "9" * 1000, "1," * 1000],
    ],
)
def test_what_are_no_seeds(text: str | int) -> None:
    with pytest.raises(ValueError, match="found ") as error:
        parse_seeds(text)
    assert "; valid: as 0-63,100" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("text", ["5,5", "0-9,9", "9,0-9", "0-9,3-4", "3-4,7,0-9", "007,7"])
def test_seeds_twice(text: str) -> None:
    with pytest.raises(ValueError, match=f"found [0-9]+ twice in '{text}'; valid: as 0-63,100"):
        parse_seeds(text)


def test_more_seeds_than_can_be_held_are_not_tried() -> None:
    for text in (f"0-{MOST_SEEDS}", "0-999999999999", f"1-{MOST_SEEDS // 2},{MOST_SEEDS}-{2 * MOST_SEEDS}"):
        with pytest.raises(ValueError, match=r"found [0-9,]+ of them in .*; valid: as 0-63,100, up to 10,000,000"):
            parse_seeds(text)
    assert len(parse_seeds(f"{MOST_SEEDS}-{2 * MOST_SEEDS - 1}")) == MOST_SEEDS
