"""ILRec's cross-layer loss over a sharded vocabulary head, with gradients.

It never holds a tensor of rows × vocabulary.

    from ilrec_kernels import LossOptions, TokenLists, cross_layer_loss

    out = cross_layer_loss(
        final_hidden, layer_hidden, head_weight, targets,
        TokenLists(indptr, tokens), rewards, options, loss_scale=1 / rows,
    )
    out.loss.backward()

`cross_layer_loss` documents shapes and dtypes, `LossOptions` the method's settings (β =
μ = λ = 0 is plain cross-entropy and costs no more), `LossOutput.rows` the statistics of
each row. Hidden rows are handed in after the final norm.

The library depends on torch, and on Triton for its `triton` backend. README.md shows
how to call and how to read it; docs/kernel.md explains how it works and what bounds it.
"""

from ilrec_kernels.api import cross_layer_loss
from ilrec_kernels.options import Backend, LossOptions, LossOutput, RowStats, TokenLists

__all__ = ["Backend", "LossOptions", "LossOutput", "RowStats", "TokenLists", "cross_layer_loss"]
