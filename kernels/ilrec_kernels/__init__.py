"""Cross-layer preference loss over a sharded vocabulary head."""

from ilrec_kernels.api import cross_layer_loss
from ilrec_kernels.types import Backend, LossOptions, LossOutput, RowStats, TokenLists

__all__ = ["Backend", "LossOptions", "LossOutput", "RowStats", "TokenLists", "cross_layer_loss"]
