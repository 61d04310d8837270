"""A side branch: decoder layers of a method's own that read the output of an early layer.

TwigVLM grows one on the first layers of a frozen model (spec selective 7.1). The engine runs it
on the uncompressed sequence, shows its last layer's attention to the method, and may let it draft
answers for the model to verify (`etcbench.speculative`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


class Branch(nn.Module):
    """Decoder layers, final norm and language-model head.

    Parameters
    ----------
    start : int
        Layers of the backbone that run in front of it.
    layers : nn.ModuleList
        Layers of the backbone's kind, numbered from 0 for a cache of their own.
    norm, head : nn.Module
        Final norm; head, from hidden states to the vocabulary.
    """

    def __init__(self, start: int, layers: nn.ModuleList, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.start = start
        self.layers, self.norm, self.head = layers, norm, head

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply norm and head to states of shape (..., hidden)."""
        logits: Tensor = self.head(self.norm(hidden))
        return logits


@dataclass(frozen=True)
class Chain:
    """Draft one sequence and verify it at once (spec selective 7.5).

    Attributes
    ----------
    length : int
        Most tokens of a draft (delta).
    confidence : float
        A draft ends behind a token whose probability is below this (theta).
    """

    length: int = 5
    confidence: float = 0.6


@dataclass(frozen=True)
class Tree:
    """Draft a tree of continuations and verify its most probable nodes at once (7.8).

    Attributes
    ----------
    width : int
        Nodes that are continued at each depth (E).
    children : int
        Continuations of a node (K_top).
    depth : int
        Longest path (D).
    nodes : int
        Nodes that are verified (N_max).
    """

    width: int = 10
    children: int = 10
    depth: int = 4
    nodes: int = 60


Speculation = Chain | Tree
