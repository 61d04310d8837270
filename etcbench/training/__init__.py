"""Training of compressors, and of the embedded models, on `transformers.Trainer`."""

from etcbench.training.data import Conversations, Indexed
from etcbench.training.log import LossCurve
from etcbench.training.model import CompressionModel
from etcbench.training.stage import Stage, choose_trainable
from etcbench.training.trainer import CompressionTrainer, train_stage

__all__ = [
    "CompressionModel",
    "CompressionTrainer",
    "Conversations",
    "Indexed",
    "LossCurve",
    "Stage",
    "choose_trainable",
    "train_stage",
]
