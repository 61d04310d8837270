"""What a measurement asks: a question on a picture, and its size in tokens."""

from __future__ import annotations

from etcbench.backbones.stream import Prompt
from etcbench.efficiency.closed_form import Request
from etcbench.kv import KVState


def request_of(prompt: Prompt, grid: tuple[int, int], kv: KVState) -> Request:
    """Read the sizes of a request from its prompt and from the first row of what was cached.

    Parameters
    ----------
    prompt : Prompt
        With one picture, or none.
    grid : tuple of int
        Raster of the uncompressed picture.
    kv : KVState
        After prefill.
    """
    entered = tuple(int(count[0]) for count in kv.entered if count is not None)
    return Request(
        grid=grid,
        before=sum(map(len, prompt.chunks)),
        bridge=len(prompt.bridge) if prompt.chunks else 0,
        after=len(prompt.after),
        entered=entered,
        marked=None if kv.marks is None else int(kv.marks[0].sum()),
    )
