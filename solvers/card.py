"""The model card of a predictor: what it is, how it was made, what was measured, how to use it."""

import json
from typing import TYPE_CHECKING

from solvers.amed import AMED
from solvers.epd import EPDTable

if TYPE_CHECKING:
    from solvers.predictor import Metric, Predictor

PIPELINE = """from backends.sample import sample
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({backbone})
images = sample(pipe, {folder}, "a lighthouse at dusk")
"""
"""How to use a predictor with a pipeline; with the line that fetches it, five lines."""

DENOISER = """from solvers import integrate, load_predictor
predictor = load_predictor({folder})
x = integrate(denoise, predictor, predictor.sigmas[0] * noise, predictor.sigmas)
"""
"""How to use one with any model."""


def model_card(predictor: "Predictor", name: str) -> str:
    """Markdown, from what the predictor's record says; `name` is that of its folder."""
    backbone, table = predictor.backbone, predictor.table
    revision = f" (revision `{backbone.revision}`)" if backbone.revision else ""
    serial, total = predictor.serial_evaluations, predictor.total_evaluations
    return f"""# {name}

A few-step sampler for the frozen diffusion model {backbone.name}{revision}: {_kind(predictor)}. It makes {serial} serial
evaluations of the network, {total} in all per image (twice as many rows where guidance has a second one), at the guidance scale
{predictor.guidance_scale:g}.

| | |
|---|---|
| family | {_kind(predictor)} |
| steps | {table.num_steps - 1} ({table.num_steps} nodes, {_numbers(predictor.sigmas.tolist())}) |
| points per step | {table.num_points} |
| first evaluation | {"analytic (AFS)" if predictor.afs else "of the network"} |
| serial evaluations | {serial} |
| total evaluations | {total} |
| guidance scale | {predictor.guidance_scale:g} |
| licence of the backbone | {backbone.licence} |

## Metrics

{_metrics(predictor.metrics, serial, total)}

## Use

```python
{_use(predictor, name)}```

{_advice(predictor, name)}

## How it was made

```json
{json.dumps(predictor.provenance, indent=2)}
```
"""


def _kind(predictor: "Predictor") -> str:
    match predictor.table:
        case EPDTable(max_order=1):
            return "EPD-Solver"
        case EPDTable(max_order=order):
            return f"EPD-Plugin of order {order}"
        case AMED():
            return "AMED"
    return "learned multistep solver"


def _metrics(metrics: "tuple[Metric, ...]", serial: int, total: int) -> str:
    if not metrics:
        return "None were measured with this file."
    lines = ["| metric | value | n | data | serial | total |", "|---|---|---|---|---|---|"]
    lines += [f"| {m.name} | {m.value:.4g} ± {m.interval:.2g} | {m.n} | {m.data} | {serial} | {total} |" for m in metrics]
    return "\n".join([*lines, "", "± is half of the 95 % interval; serial and total are evaluations of the network per image."])


def _use(predictor: "Predictor", name: str) -> str:
    backbone = predictor.backbone
    if backbone.pipeline is None:
        return DENOISER.format(folder=json.dumps(name, ensure_ascii=False))
    revision = f", revision={json.dumps(backbone.revision)}" if backbone.revision else ""
    return PIPELINE.format(folder=json.dumps(name, ensure_ascii=False), backbone=json.dumps(backbone.name) + revision)


def _advice(predictor: "Predictor", name: str) -> str:
    if predictor.backbone.pipeline is None:
        return "`denoise(x, sigma)` is the model's E[x0 | x], `noise` unit noise. No file of the predictor is ever executed."
    arguments = f"num_inference_steps={predictor.table.num_steps - 1}, guidance_scale={predictor.guidance_scale:g}"
    return f"""`sample` evaluates a step's points as one batch. For every feature of the pipeline (callbacks, image to image),
one evaluation after the other, make the predictor its scheduler:
`pipe.scheduler = PredictorScheduler.from_predictor({json.dumps(name, ensure_ascii=False)}, pipe)`, then
`pipe("a lighthouse at dusk", {arguments})`. No file of the predictor is ever executed."""


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
