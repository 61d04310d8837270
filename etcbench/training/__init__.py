"""Training of compressors, and of the embedded models, on `transformers.Trainer`."""

from etcbench.training.model import CompressionModel
from etcbench.training.stage import Stage, choose_trainable
from etcbench.training.trainer import CompressionTrainer, Indexed, LossCurve, train_stage

__all__ = [
    "CompressionModel",
    "CompressionTrainer",
    "Indexed",
    "LossCurve",
    "Stage",
    "choose_trainable",
    "train_stage",
]
