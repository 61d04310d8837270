"""What a training leaves on disk as it goes: its log, and checkpoints to continue from."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class LossCurve(TrainerCallback):
    """Append every log record, with the wall time so far, to one file.

    A record ends at every checkpoint, so that a run that continues from there averages over the
    same steps as one that was never stopped. What a stopped run had logged behind its last
    checkpoint is removed, since it happens again.

    Parameters
    ----------
    file : Path
        One json object per line.
    trainer : CompressionTrainer
        Whose clock starts with the first step.
    """

    def __init__(self, file: Path, trainer: Any) -> None:
        self.file, self.trainer = file, trainer
        self.begin = time.monotonic()
        self.before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the records up to the step from which the run continues."""
        self.begin = time.monotonic()
        self.trainer.restart_clock()
        if not state.is_world_process_zero or not self.file.exists():
            return
        kept = [r for r in read_log(self.file) if r["step"] <= state.global_step]
        self.before = max((record["seconds"] for record in kept), default=0.0)
        self.file.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End a record where a checkpoint is written."""
        if control.should_save:
            control.should_log = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Write one record; ``seconds`` counts training time, stops in between left out."""
        if not state.is_world_process_zero:
            return
        seconds = round(self.before + time.monotonic() - self.begin, 1)
        record = {"step": state.global_step, "seconds": seconds, **(logs or {})}
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


def read_log(file: Path) -> list[dict[str, Any]]:
    """Read the records of a log; a last line that was cut off is left out."""
    records = []
    for line in file.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def last_complete(folder: Path) -> str | None:
    """Find the last checkpoint that was written to the end; its state file is written last."""
    found: dict[int, Path] = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            step = int(json.loads((path / "trainer_state.json").read_text())["global_step"])
        except (OSError, ValueError, KeyError):
            continue
        found[step] = path
    return str(found[max(found)]) if found else None
