import pytest
import torch
from torch import Tensor

from metrics.texts import Texts


class Counted:
    """An encoder that writes down what it is asked: a prompt's length, twice."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompt: str) -> Tensor:
        self.asked.append(prompt)
        lengths = torch.tensor([float(len(prompt))], requires_grad=True)
        return torch.stack([lengths, lengths], 1)


def lengths(found: Tensor) -> list[float]:
    assert torch.equal(found[:, 0], found[:, 1])
    return found[:, 0].tolist()


def test_each_prompt_is_encoded_once() -> None:
    encode = Counted()
    texts = Texts(encode)
    assert lengths(texts(["a", "boat", "a", ""])) == [1, 4, 1, 0]
    assert lengths(texts(("boat", "ship!"))) == [4, 5]
    assert lengths(texts(["", "a"])) == [0, 1]
    assert encode.asked == ["a", "boat", "", "ship!"]


def test_the_last_prompts_are_remembered() -> None:
    """Asking for one again counts as its last use."""
    encode = Counted()
    texts = Texts(encode, entries=2)
    for prompt in ("a", "bb", "a", "ccc"):
        texts([prompt])
    assert list(texts.found) == ["a", "ccc"]
    assert lengths(texts(["a", "bb"])) == [1, 2]
    assert encode.asked == ["a", "bb", "ccc", "bb"]


@pytest.mark.parametrize("entries", [0, 1, 3])
def test_one_call_may_ask_for_more_than_is_remembered(entries: int) -> None:
    encode = Counted()
    texts = Texts(encode, entries)
    prompts = ["a" * length for length in (3, 1, 4, 1, 5, 9, 2, 6)]
    assert lengths(texts(prompts)) == [3, 1, 4, 1, 5, 9, 2, 6]
    assert encode.asked == ["a" * length for length in (3, 1, 4, 5, 9, 2, 6)]
    assert list(texts.found) == prompts[len(prompts) - entries :]
    assert lengths(texts(prompts)) == [3, 1, 4, 1, 5, 9, 2, 6]


def test_what_is_remembered_survives_a_call_that_forgets_it() -> None:
    """The first prompts of a call are the oldest, and would be forgotten before they are answered."""
    texts = Texts(Counted(), entries=2)
    texts(["a", "bb"])
    assert lengths(texts(["a", "ccc", "dddd", "eeeee", "bb"])) == [1, 3, 4, 5, 2]
    assert list(texts.found) == ["eeeee", "bb"]


def test_nothing_has_a_gradient() -> None:
    assert not Texts(Counted())(["a"]).requires_grad


def test_changing_an_answer_changes_no_other() -> None:
    texts = Texts(Counted())
    texts(["a", "a"]).zero_()
    assert lengths(texts(["a"])) == [1]


def test_no_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts: none; valid: at least one"):
        Texts(Counted())([])


def test_what_the_encoder_raises_is_raised_and_nothing_remembered() -> None:
    def encode(prompt: str) -> Tensor:
        raise RuntimeError("no memory")

    texts = Texts(encode)
    with pytest.raises(RuntimeError, match="no memory"):
        texts(["a"])
    assert not texts.found
