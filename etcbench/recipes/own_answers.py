"""Write conversations whose answers are a model's own, to train drafts on.

A draft has to say what the model that verifies it would say, so the model's greedy answers are
the data that a drafter needs, whatever the references would be:

    python -m etcbench.recipes.own_answers --method twigvlm --tokens 21 --out runs/own-answers
    etcbench train --recipe micro-twigvlm-long --data runs/own-answers

writes ``answers.json`` in LLaVA's format. Without ``--pictures`` the scenes are drawn from the
embedded training stream and written beside it, none of them a benchmark's; with it, every picture
of a folder is asked about, and stays where it is.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from etcbench.backbones import Backbone, load_backbone
from etcbench.checkpoints import installed
from etcbench.compressor import Compressor
from etcbench.console import progress
from etcbench.doc import Doc, Picture
from etcbench.engine import Settings, answers
from etcbench.errors import UsageError
from etcbench.micro.stream import TurnStream
from etcbench.options import pairs, typed_options
from etcbench.registry import load
from etcbench.run import load_compressor
from etcbench.task import Task

PROMPTS = (
    "Describe the picture.",
    "Describe the picture in detail.",
    "Describe the scene.",
    "List every object in the image.",
    "List all objects from left to right.",
    "Describe all the objects from top to bottom.",
    "Name all the objects in the picture and where each of them is.",
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Asked(Task):
    """Questions that nothing scores."""

    name = "own_answers"

    def render(self, doc: Doc, style: str) -> str:
        """Ask the question as it is."""
        return str(doc.fields["question"])


def micro_pictures(folder: Path, count: int, seed: int) -> list[Path]:
    """Write training scenes of the embedded stream as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = TurnStream(seed=seed, turns=0, blind_share=0)
    paths = [folder / f"{number:06d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(stream.sample(number)["picture"]).save(path)
    return paths


def pictures_of(folder: Path, count: int) -> list[Path]:
    """Find the first pictures of a folder, by name.

    Raises
    ------
    UsageError
        If there are none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UsageError(f"{folder} has no pictures ({', '.join(SUFFIXES)})")
    return found[:count]


def own_answers(
    model: Backbone,
    method: Compressor,
    pictures: Sequence[Path],
    prompts: Sequence[str] = PROMPTS,
    *,
    shortest: int = 1,
    longest: int = 128,
    batch_size: int = 64,
) -> Iterator[tuple[Path, str, str]]:
    """Ask about every picture, greedily.

    Parameters
    ----------
    model : Backbone
        Who answers.
    method : Compressor
        How its visual tokens are compressed.
    pictures, prompts : sequence
        Every prompt is asked about every picture.
    shortest, longest : int
        Tokens of an answer, its end token not counted. An answer that does not end within
        ``longest`` is left out: where it would be cut the model goes on.

    Yields
    ------
    Path, str, str
        Picture, prompt and answer.

    Raises
    ------
    UsageError
        If a picture cannot be read.
    """
    tokenizer = model.processor.tokenizer
    settings = Settings(batch_size=batch_size, max_new_tokens=longest + 1)
    docs = (
        Doc(f"{path} {prompt}", str(path), (Picture(path.read_bytes(), path=str(path)),),
            {"question": prompt, "path": path}, None)
        for path in pictures for prompt in prompts
    )  # fmt: skip
    count = len(pictures) * len(prompts)
    with progress("own answers", count) as advance, installed(method, model):
        for batch in answers(model, method, Asked(), docs, settings):
            advance(len(batch))
            for answer in batch:
                if answer.response is None:
                    raise UsageError(f"{answer.doc.fields['path']}: {answer.error}")
                said = tokenizer(f" {answer.response}", add_special_tokens=False)["input_ids"]
                if answer.response and shortest <= len(said) <= longest:
                    yield answer.doc.fields["path"], answer.prompt, answer.response


def write(out: Path, found: Iterable[tuple[Path, str, str]]) -> tuple[Path, int]:
    """Write conversations in LLaVA's format.

    Returns
    -------
    Path, int
        The json file, whose pictures are relative to its folder, and how many samples it has.
    """
    out.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = [
        {
            "id": str(number),
            "image": os.path.relpath(path, out),
            "conversations": [
                {"from": "human", "value": f"<image>\n{prompt}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, (path, prompt, answer) in enumerate(found)
    ]
    file = out / "answers.json"
    file.write_text(json.dumps(records, indent=0), encoding="utf-8")
    return file, len(records)


def main() -> None:
    """Read the command line, answer, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="micro-llava", help="who answers")
    parser.add_argument("--method", default="full", help="how visual tokens are compressed")
    parser.add_argument("--tokens", help="budget of the method")
    parser.add_argument("--checkpoint", help="weights of the method")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=Path, help="folder; default: scenes of the stream")
    parser.add_argument("--count", type=int, default=1000, help="most pictures")
    parser.add_argument("--prompt", action="append", help="question; repeat for several")
    parser.add_argument("--shortest", type=int, default=6, help="least tokens of an answer")
    parser.add_argument("--longest", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1, help="of the scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/own-answers"))
    chosen = parser.parse_args()
    try:
        kind = {chosen.method: load("baselines", chosen.method)}
        options = typed_options(kind, pairs(chosen.option, "--option"))[chosen.method]
        model = load_backbone(chosen.model, device=chosen.device)
        method = load_compressor(
            chosen.method, chosen.tokens, model, checkpoint=chosen.checkpoint, **options
        ).compressor
        if chosen.pictures is None:
            pictures = micro_pictures(chosen.out / "pictures", chosen.count, chosen.seed)
        else:
            pictures = pictures_of(chosen.pictures, chosen.count)
        found = own_answers(
            model, method, pictures, chosen.prompt or PROMPTS, shortest=chosen.shortest,
            longest=chosen.longest, batch_size=chosen.batch_size,
        )  # fmt: skip
        file, count = write(chosen.out, found)
    except UsageError as error:
        parser.error(str(error))
    print(f"{file}: {count} answers to {len(pictures)} pictures")


if __name__ == "__main__":
    main()
