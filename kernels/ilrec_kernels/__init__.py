"""ILRec's cross-layer loss over a sharded vocabulary head, with gradients, never holding a tensor of rows × vocabulary.

    from ilrec_kernels import LossOptions, TokenLists, cross_layer_loss

    out = cross_layer_loss(final_hidden, layer_hidden, head_weight, targets, TokenLists(indptr, tokens), rewards, options, loss_scale=1 / rows)
    out.loss.backward()

`cross_layer_loss` documents shapes and dtypes, `LossOptions` the method's settings (β = μ = λ = 0 is plain cross-entropy and costs no more),
`LossOutput.rows` the per-row statistics. Backends: `reference` (fp64 truth by autograd), `torch` (chunked, any device, the CPU's production path),
`triton` (CUDA). Hidden rows are handed in after the final norm. With a `tp_group` each rank passes its shard of the head and `vocab=(start, stop)`;
every other argument is the same on all ranks, and so are the loss, the statistics and the hidden rows' gradients.

Depends on torch, and on Triton for its backend; on nothing else of this project. docs/kernel.md explains how it works and what bounds it.
"""

from ilrec_kernels.api import cross_layer_loss
from ilrec_kernels.types import Backend, LossOptions, LossOutput, RowStats, TokenLists

__all__ = ["Backend", "LossOptions", "LossOutput", "RowStats", "TokenLists", "cross_layer_loss"]
