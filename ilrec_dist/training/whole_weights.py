"""ZeRO 3: weights that are cut over the data-parallel ranks are whole while in use.

DeepSpeed fetches the weights of every module before its forward and its backward
pass. Here the modules whose weights it fetches are the decoder's layers, each of them
at once and the next one beside it. All other weights (the vocabulary's tables, the last
norm, adapters and added rows) are read outside of their modules' own passes: they are
gathered when a step begins, and stay whole until DeepSpeed cuts all weights again in
the optimizer's step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ilrec_dist.distributed.deepspeed_mpu import import_deepspeed
from ilrec_dist.model.layers import DecoderLayer
from ilrec_dist.training.weight_ranges import cuts_weights

# What uses a weight for a whole step, among the numbers of the layers that use it.
WHOLE_STEP = -1


def fetch_by_layer(engine: Any) -> None:
    """Let the weights of each layer be fetched
    at once, and those outside of layers for a step.
    """
    _remove_hooks(engine)
    _fetch_layers(engine)
    outside = weights_outside_layers(engine.module)

    def gather(*_: Any) -> None:
        _gather([weight for weight in outside if not weight.data.numel()])
        for weight in outside:
            weight.ds_active_sub_modules.add(WHOLE_STEP)

    engine.module.register_forward_pre_hook(gather)


@contextmanager
def whole_weights(engine: Any) -> Iterator[None]:
    """Every weight of this rank's tensor-parallel place is whole within the block.

    For what reads weights outside of a training step. What is written to them is gone
    behind the block. A collective over the data-parallel ranks; does nothing where
    weights are not cut.
    """
    if not cuts_weights(engine):
        yield
        return
    # A layer that is run here must fetch and cut nothing.
    _remove_hooks(engine)
    _cut(engine)
    _gather(list(engine.module.parameters()))
    try:
        yield
    finally:
        _cut(engine)
        _fetch_layers(engine)


def layers_of(module: nn.Module) -> list[DecoderLayer]:
    """The decoder's layers, the first one first."""
    return [layer for layer in module.modules() if isinstance(layer, DecoderLayer)]


def weights_outside_layers(module: nn.Module) -> list[Any]:
    """Those that are whole for a step at a time."""
    inside = {id(weight) for layer in layers_of(module) for weight in layer.parameters()}
    return [weight for weight in module.parameters() if id(weight) not in inside]


def forget_engine(engine: Any) -> None:
    """Free what a destroyed engine holds, which DeepSpeed's
    caches would keep as long as the process lives.
    """
    if not cuts_weights(engine):
        return
    zero = import_deepspeed().runtime.zero
    stack = zero.parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    coordinator = zero.partitioned_param_coordinator.PartitionedParameterCoordinator
    remembering = coordinator._PartitionedParameterCoordinator__params_to_release
    for cell in remembering.__closure__:
        # The cache stands behind what measures the time of its calls.
        getattr(cell.cell_contents, "cache_clear", lambda: None)()
    # Every weight knows the optimizer, which would keep its gradients while a weight is known.
    vars(engine.optimizer).clear()


def _gather(weights: list[Any]) -> None:
    if weights:
        weights[0].all_gather(param_list=weights)


def _cut(engine: Any) -> None:
    engine.optimizer.parameter_offload.partition_all_parameters()


def _remove_hooks(engine: Any) -> None:
    offload = engine.optimizer.parameter_offload
    for hook in itertools.chain(offload.forward_hooks, offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def _fetch_layers(engine: Any) -> None:
    utils = import_deepspeed().utils
    for number, layer in enumerate(layers_of(engine.module)):
        # A leaf's weights are fetched together.
        utils.set_z3_leaf_module(layer, True)
        engine.optimizer.parameter_offload._register_deepspeed_module(layer, count=[number])
