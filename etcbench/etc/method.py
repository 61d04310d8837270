"""The learned tokens of ETC, and every choice of its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from etcbench.bottleneck import Bottleneck
from etcbench.compressor import ModelSpec
from etcbench.errors import UsageError
from etcbench.options import require_positive

if TYPE_CHECKING:
    from etcbench.etc.objective import VIDLoss

AttentionSource = Literal["same_pass_qk", "full_pass", "frozen_teacher"]
TextRows = Literal["instruction", "all_non_label", "all"]
DecoderKind = Literal["bottleneck", "outer_product", "qformer", "linear_interpolation"]
Reduction = Literal["sum", "mean_tokens", "mean_all"]
Granularity = Literal["channel", "scalar", "entry"]


@dataclass(eq=False)
class ETC(Bottleneck):
    """M distinct learned tokens, trained with L_CE + lambda * L_VID (eq. 18).

    All options but those of `Bottleneck` and ``embeddings`` concern training only.

    Parameters
    ----------
    embeddings : {"distinct", "shared"}
        One learned embedding per token, or one for all as in VoCo (register E8).
    lambda_vid : float
        Weight of the auxiliary loss; 0 trains exactly as VoCo-LLaMA does.
    auxiliary : {"vid", "mse", "none"}
        Likelihood with learned variance, the same with variance 1, or no auxiliary loss (Table 7).
    alpha : float
        Weight of the attention in the target, 0 (uniform) to 1 (eq. 11).
    attn_source : {"same_pass_qk", "full_pass", "frozen_teacher"}
        Where the target comes from (register E1), because behind the bottleneck text sees no
        picture: queries and keys of the training pass, softmax as without the bottleneck; or a
        second pass without gradients and without learned tokens, by the model itself or by a copy
        of its initial weights. A second pass costs another forward; the copy takes the memory
        of the model's weights once more in every process (LLaVA-1.5-7B: 28 GB, as full-precision
        weights are trained, 14 GB under DeepSpeed).
    text_rows : {"instruction", "all_non_label", "all"}
        Which text tokens are averaged in eq. 9 (register E2): the questions, everything that is
        not answered for (template included), or everything.
    detach : bool
        Whether the target carries no gradient (register E3).
    layer : int
        Alignment layer, an index of the hidden-states tuple: -1 is the last. 0 is read as the
        output of the first block, the first place where Z has seen the picture (register E13).
    z_layer : {"same", "last"}
        Layer of Z: the target's, or always the last (the other reading of register E13).
    final_norm : bool
        Whether states of the last layer are taken behind the final norm.
    decoder : {"bottleneck", "outer_product", "qformer", "linear_interpolation"}
        What reconstructs V from Z (register E6, Table 9).
    rank : int
        Width of the bottleneck; row vectors per learned token of the outer product.
    decoder_width : int
        Inner width of the outer product's MLP and of the Q-Former.
    decoder_projection : bool
        Whether linear interpolation is followed by a D x D map.
    canonical_grid : int
        Side of the raster onto which decoders write, to be resampled to each picture's own, where
        the number of visual tokens depends on the picture (register E7).
    variance : {"channel", "scalar", "entry"}
        One variance per channel, one in all, or one per token and channel (register E5).
    vid_reduction : {"sum", "mean_tokens", "mean_all"}
        Over tokens and channels (register E4); the batch is always averaged.
    """

    embeddings: Literal["distinct", "shared"] = "distinct"
    lambda_vid: float = 1e-5
    auxiliary: Literal["vid", "mse", "none"] = "vid"
    alpha: float = 0.6
    attn_source: AttentionSource = "same_pass_qk"
    text_rows: TextRows = "instruction"
    detach: bool = True
    layer: int = -1
    z_layer: Literal["same", "last"] = "same"
    final_norm: bool = True
    decoder: DecoderKind = "bottleneck"
    rank: int = 8
    decoder_width: int = 512
    decoder_projection: bool = True
    canonical_grid: int = 32
    variance: Granularity = "channel"
    vid_reduction: Reduction = "sum"

    @classmethod
    def name(cls) -> str:
        """Public name."""
        return "etc"

    def prepare(self, spec: ModelSpec) -> None:
        """Create the learned embeddings; check the options."""
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"etc: alpha is a mixing weight between 0 and 1, not {self.alpha}")
        if not 0 <= self.lambda_vid < float("inf"):
            raise UsageError(f"etc: lambda_vid is a weight of 0 or more, not {self.lambda_vid}")
        if not -spec.layers - 1 <= self.layer <= spec.layers:
            raise UsageError(f"etc: {spec.name} has layers 0 to {spec.layers}, not {self.layer}")
        require_positive(
            "etc",
            rank=self.rank,
            decoder_width=self.decoder_width,
            canonical_grid=self.canonical_grid,
        )
        if not self.detach and self.attn_source != "same_pass_qk":
            raise UsageError(
                f"etc: {self.attn_source} runs without gradients, so its target is always "
                "detached; leave detach out or use attn_source=same_pass_qk"
            )
        if self.variance == "entry" and spec.visual_tokens is None:
            raise UsageError(
                f"etc: variance=entry needs a fixed number of visual tokens, which {spec.name} "
                "has not; use channel or scalar"
            )
        super().prepare(spec)

    @property
    def rows(self) -> int:
        """Distinct learned embeddings."""
        return 1 if self.embeddings == "shared" else super().rows

    def training_module(self, spec: ModelSpec) -> VIDLoss | None:
        """Build the decoder and variances, which exist only while training."""
        if self.lambda_vid == 0 or self.auxiliary == "none":
            return None
        from etcbench.etc.objective import VIDLoss

        return VIDLoss(self, spec)
