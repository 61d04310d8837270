"""ETC, Extreme Token Compression: one to four tokens for a picture (arXiv 2606.00543).

At inference ETC is a bottleneck of M learned tokens. In training one loss is added: from the
learned tokens' hidden states a small decoder must reconstruct, under a Gaussian with learned
variance (variational information distillation, VID), the visual hidden states of the same layer,
weighted by how strongly the text attends to each of them. Spec abstractive 1; what the paper
leaves open are the decision register's E1-E13.

``method``
    the learned tokens and every option.
``target``
    the statistic: text-to-image attention and the weighted states (eqs. 8-11).
``decoders``
    from Z to the mean of the target: the ablation of Table 9.
``objective``
    the likelihood (eqs. 15-18).
"""

from etcbench.etc.method import ETC
from etcbench.etc.objective import VIDLoss
from etcbench.etc.target import attention_weighted_target

METHOD = ETC

__all__ = ["ETC", "METHOD", "VIDLoss", "attention_weighted_target"]
