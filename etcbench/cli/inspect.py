"""``etcbench inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from etcbench.cli.app import (
    Budgets,
    Checkpoint,
    MethodOptions,
    Methods,
    Model,
    Seed,
    Untrained,
    app,
    examples,
    split_list,
)
from etcbench.errors import BudgetError, MissingCheckpointError, UsageError


@app.command(
    epilog=examples(
        "etcbench inspect --method fastv,visionzip --tokens 21 --image cat.jpg "
        '--question "Is there a cat in the image? Please answer yes or no."'
    )
)
def inspect(
    method: Methods,
    image: Annotated[Path, typer.Option(help="Picture file.")],
    question: Annotated[str, typer.Option(help="What the model is asked, as it is to read it.")],
    tokens: Budgets = None,
    model: Model = None,
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .svg or .pdf.")] = Path(
        "inspect.png"
    ),
    checkpoint: Checkpoint = None,
    untrained: Untrained = False,
    option: MethodOptions = None,
    seed: Seed = 0,
) -> None:
    """Draw which tokens of a picture methods keep, merge and drop.

    One row per method, or setting such as sparsevlm20-64, with a panel per stage and the answer. A
    method that cannot serve a budget is listed with the reason.
    """
    from etcbench.backbones import load_backbone
    from etcbench.backbones.loading import default_model
    from etcbench.compressor import Budget
    from etcbench.console import notice, quiet_libraries, show, waiting
    from etcbench.doc import Picture, UnreadableImage
    from etcbench.inspection import inspect as follow
    from etcbench.inspection_picture import draw
    from etcbench.options import pairs
    from etcbench.sweep import Sweep

    if not image.is_file():
        raise UsageError(f"--image {image} does not exist")
    budgets = [Budget.parse(text) for text in split_list(tokens)]
    sweep = Sweep(
        split_list(method),
        (),
        budgets,
        options=pairs(option or (), "--option"),
        checkpoint=checkpoint,
        untrained=untrained,
        seed=seed,
    )
    variants = sweep.variants()
    sweep.method_options()  # a wrong option is said before anything is loaded
    picture = Picture(image.read_bytes(), path=str(image))
    try:
        opened = picture.open()
    except UnreadableImage as error:
        raise UsageError(f"--image {image} is not a picture: {error}") from error
    quiet_libraries()
    with waiting("loading the model"):
        backbone = load_backbone(model or default_model())
    methods, titles = [], []
    for name, budget in variants:
        title = " ".join(filter(None, (name, str(budget or ""))))
        try:
            methods.append(sweep.build(name, budget, backbone))
            titles.append(title)
        except (BudgetError, MissingCheckpointError) as error:
            if len(variants) == 1:
                raise
            notice(f"left out: {title}: {error}")
    if not methods:
        raise UsageError("nothing to draw: no method can serve what was asked")
    found = follow(backbone, methods, picture, question, titles)
    draw(found, backbone.view(opened), question, out)
    rows = [
        [each.title, "; ".join(f"{s.label} {s.tokens}" for s in each.stages), each.answer]
        for each in found
    ]
    show(["method", "visual tokens left", "answer"], rows, [f"drawn: {out}"])
