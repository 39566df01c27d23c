"""What the report's numbers are, in words."""

from typing import Any

from stages.params import Refs
from stages.results import WATCHED, Result

PAIRED = """\
Compared prompt by prompt, on the same noise. less {base}: the mean difference to {base}. wins: the share of prompts on which \
the value is higher than that of {base}, where a tie is half a win, with its 95 % interval (Agresti and Coull). Of brightness \
and saturation neither more nor less is better. Each interval is for itself: of twenty, one is expected to miss. What is one \
number for all images is left out."""


def origin(refs: Refs) -> str:
    """What Frechet distances are measured from."""
    match refs.source:
        case "data":
            return "the training digits"
        case "reference":
            return "other images of the reference"
        case _:
            return "the reference set"


def unseen(refs: Refs) -> str:
    """What the scores in held_out.json are of."""
    match refs.source:
        case "data":
            return "Held-out real digits"
        case "reference":
            return "Other images of the reference"
        case _:
            return "Images of the reference set"


def legend(result: Result, refs: Refs) -> list[tuple[str, str]]:
    """Terms and their meanings, in the order of the table's columns."""
    columns = {quantity.key: quantity.name for quantity in result.quantities if quantity.key not in result.scores}
    ranges = result.protocol[0]["ranges"]
    meanings = {
        "frechet_distance": f"Frechet distance to {origin(refs)}; less is better. Below 50,000 images its label says how many"
        + (f". The lowest of {ranges} ranges of samples" if ranges > 1 else ""),
        "distance_to_reference": "Frechet distance to the reference's images of the same prompts and noise",
        "kernel_distance": "kernel distance to the same images, in the same features; less is better, below 0 it is noise",
        "precision": "share of images that lie among those of the reference set",
        "recall": "share of the reference set that lies among the images",
        "rmse": "root mean squared difference to the reference on the same noise, of "
        + ("states in [-1, 1]" if refs.source == "data" else "latents"),
    }
    return [
        ("n", f"{len(result.prompts)} test samples, the same prompts and noise for every sampler"),
        ("±", "1.96 standard errors, of distances and RMSE to first order in what each image adds to them"),
        ("serial, total", "evaluations of the network one after the other, and rows per image"),
        *((columns[key], meanings[key]) for key in columns),
        *((f"protocol of {record['label']}", protocol(record)) for record in result.protocol),
        ("reward", f"what rdpo was trained for: {mixture(result)}"),
        *(("judges", f"{name}: never in the reward, and never learned from; more is better") for name in judges(result)),
        *((record["name"], f"{record['scale']}; usual: {record['range']}") for record in result.metrics),
        (", ".join(WATCHED), "of the images, 0 to 1: what a reward is easily raised by; neither good nor bad"),
    ]


def judges(result: Result) -> list[str]:
    """All judges as one entry, if there are any."""
    return [", ".join(result.judges)] if result.judges else []


def mixture(result: Result) -> str:
    """The reward, by the weights and divisors of the metrics' records."""
    if not result.mixed:
        return result.rewarded[0]["name"]
    parts = [
        f"{record['weight']:g} × {record['name']}" + (f" / {record['divisor']:g}" if record["divisor"] != 1 else "")
        for record in result.rewarded
    ]
    return f"({' + '.join(parts)}) / {sum(record['weight'] for record in result.rewarded):g}"


def protocol(record: dict[str, Any]) -> str:
    """How a distance comes about."""
    return "; ".join(f"{key}: {words(value)}" for key, value in record.items() if key not in ("name", "label"))


def words(value: Any) -> str:
    """What stands in a record."""
    match value:
        case dict():
            return ", ".join(f"{key} {words(each)}" for key, each in value.items() if each is not None)
        case list():
            return " and ".join(map(words, value))
        case float():
            return f"{value:g}"
        case _:
            return str(value)
