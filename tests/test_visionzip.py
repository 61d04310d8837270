"""VisionZip with a tuned projector: what is trained, what the checkpoint holds, and its budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_invariants import BACKBONES, ask, close

from etcbench import registry
from etcbench.checkpoints import installed, load_method
from etcbench.compressor import Budget
from etcbench.errors import MissingCheckpointError, UsageError
from etcbench.recipes import load_recipe, train

RECIPE = """
method: visionzip
tokens: 9
options: {{projector: tuned}}
model: {model}
data: micro
turns: 2
precision: fp32
stages:
  - {{steps: 2, batch_size: 2, warmup_steps: 0, learning_rate: 1.0e-2, tune_model: false,
     tune_projector: true}}
"""


@pytest.mark.parametrize("family", BACKBONES)
def test_only_the_projector_is_tuned(tmp_path: Path, family: str) -> None:
    """Spec selective 4.7."""
    backbone = BACKBONES[family](tmp_path / "model")
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=tmp_path / "model"))
    result = train(load_recipe(str(file)), tmp_path / "out")
    stored = load_file(result / "model.safetensors")
    projector = ("multi_modal_projector", ".merger.", "deepstack_merger_list")
    assert stored and all(any(part in name for part in projector) for name in stored)
    method, weights = load_method(
        "visionzip", Budget(9), backbone, checkpoint=str(result), options={"projector": "tuned"}
    )
    assert method.tuned.keys() == {name.removeprefix("model.") for name in stored}
    assert weights["checkpoint"] == "result"
    free = registry.load("baselines", "visionzip").from_budget(Budget(9), backbone.spec)
    with torch.inference_mode():
        _, plain = ask(backbone, free)
        with installed(method, backbone):
            _, tuned = ask(backbone, method)
        _, after = ask(backbone, free)
    assert close(plain, after) and not close(plain, tuned)
    with pytest.raises(UsageError, match="tokens 9 instead of 4"):
        load_method("visionzip", Budget(4), backbone, checkpoint=str(result))


def test_the_option_asks_for_weights_and_takes_a_checkpoint(tmp_path: Path) -> None:
    backbone = BACKBONES["llava"](tmp_path)
    with pytest.raises(MissingCheckpointError, match="visionzip"):
        load_method("visionzip", Budget(9), backbone, options={"projector": "tuned"})
    with pytest.raises(UsageError, match="projector"):
        load_method("visionzip", Budget(9), backbone, options={"projector": "own"})
