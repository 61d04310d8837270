"""VoCo-LLaMA: compress a picture into the KV cache of a repeated ``<voco>`` token.

From spec abstractive 2. Plain next-token cross-entropy through the bottleneck mask; no teacher.
Decisions of its register: VoCo's prompt normalisation (V1); the KV cache of everything in front
of the text is evicted, as the paper describes and the released code intends (2.4).
"""

from __future__ import annotations

from dataclasses import dataclass

from etcbench.bottleneck import Bottleneck


@dataclass(eq=False)
class VoCo(Bottleneck):
    """One learned embedding, repeated ``tokens`` times (one vocabulary entry in the original)."""

    @property
    def rows(self) -> int:
        """One embedding serves every learned token."""
        return 1


METHOD = VoCo
