"""DeepSpeed's ZeRO and AdamW under the Megatron groups."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ilrec_dist.distributed.deepspeed_mpu import DeepSpeedMPU, import_deepspeed
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import return_freed_memory
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.trained_rows import TrainedRows
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.weight_ranges import cuts_weights
from ilrec_dist.training.whole_weights import fetch_by_layer, layers_of

# The key of an optimizer's group with its learning rate as a multiple of train.learning_rate.
RATE_RATIO = "rate_ratio"
# Gradients, or one parameter's, that one rank alone copies at a time in fp32.
LONE_BUCKET_GRADIENTS = 1 << 22
# Gradients that go through DeepSpeed's bucket at a time under ZeRO 3, which is for saving memory.
CUT_BUCKET_GRADIENTS = 50_000_000


def deepspeed_config(
    config: TrainConfig, dp: int, is_cuda: bool, layer_weights: int = 0
) -> dict[str, Any]:
    """DeepSpeed's own configuration for `dp` data-parallel ranks.

    layer_weights: the elements of a decoder layer on this rank.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    # In bf16 under ZeRO 1 DeepSpeed has another optimizer, which sums the gradients when all are
    # there.
    sums_buckets = config.precision == "fp32" or config.zero_stage >= 2
    # A bucket of gradients is summed on a stream of its own while the next one fills.
    zero["overlap_comm"] = is_cuda and dp > 1 and sums_buckets
    if config.zero_stage == 3:
        zero |= {
            "reduce_bucket_size": CUT_BUCKET_GRADIENTS,
            # Two layers are whole at a time, the one at hand and the one that comes next.
            "stage3_prefetch_bucket_size": layer_weights,
            "stage3_max_live_parameters": 2 * layer_weights,
            # The last layer stays whole till its backward pass, which comes next.
            "stage3_max_reuse_distance": 1,
            # No weight is kept whole for being small.
            "stage3_param_persistence_threshold": 0,
            # It would replace torch's function for the whole process.
            "memory_efficient_linear": False,
        }
    if dp == 1 and config.precision == "fp32":
        # There is nothing to sum, so the copies that DeepSpeed makes for it are kept small.
        zero |= {"contiguous_gradients": False, "reduce_bucket_size": LONE_BUCKET_GRADIENTS}
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // (dp * config.accumulation_steps),
        "gradient_accumulation_steps": config.accumulation_steps,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if config.precision == "bf16" else {}),
        "communication_data_type": "fp32",
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }


def build_engine(module: nn.Module, config: TrainConfig, parallel: ParallelState) -> Any:
    """Wrap the module for training, of which
    the optimizer gets what requires a gradient.

    The engine averages gradients over data-parallel ranks and
    micro-batches, so a loss that is a sum over rows must come
    scaled by dp × accumulation_steps / N (METHOD.md §6).
    """
    optimizer = adamw(module, config)
    layer = next(iter(layers_of(module)), None)
    layer_weights = 0 if layer is None else sum(weight.numel() for weight in layer.parameters())
    is_cuda = parallel.device.type == "cuda"
    deepspeed = import_deepspeed()
    # In bf16 it prints how much memory is used, whatever the level of its log.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(config, parallel.dp, is_cuda, layer_weights),
            mpu=DeepSpeedMPU(),
            dist_init_required=False,
        )
    if config.precision == "fp32":
        _share_weights(engine)
    if cuts_weights(engine):
        fetch_by_layer(engine)
    return_freed_memory()

    def after_first_step(*_: Any) -> None:
        # What the first step has used beside the optimizer's new state fits no later one.
        handle.remove()
        return_freed_memory()

    handle = optimizer.register_step_post_hook(after_first_step)
    return engine


def _share_weights(engine: Any) -> None:
    """Let the weights be the master weights; DeepSpeed copies them in fp32 too."""
    optimizer = engine.optimizer
    if cuts_weights(engine):
        for master, weights in zip(
            optimizer.fp32_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups_flat,
            strict=True,
        ):
            master.data = weights.data
        return
    for master, partitions, group in zip(
        optimizer.single_partition_of_fp32_groups,
        optimizer.parallel_partitioned_bit16_groups,
        optimizer.real_dp_process_group,
        strict=True,
    ):
        master.data = partitions[dist.get_rank(group)].data
    # What each weight knows of its master weights are views of the copy.
    optimizer._link_all_hp_params()


def adamw(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW whose weight decay applies to matrices, not to vectors (norms, biases).

    Rows of the vocabulary that are parameters of their own are a
    group of their own. With a pretrained model the step is fused;
    decoders from scratch keep the bits that they have had.
    """
    pretrained = any(isinstance(m, Backbone) and m.checkpoint_family for m in module.modules())
    rows = [p for m in module.modules() if isinstance(m, TrainedRows) for p in m.parameters()]
    among_rows = set(map(id, rows))
    weights = [p for p in module.parameters() if p.requires_grad and id(p) not in among_rows]
    rate, rows_rate = config.learning_rate, config.new_rows_learning_rate or config.learning_rate
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in weights if p.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
        {"params": rows, "weight_decay": config.weight_decay, RATE_RATIO: rows_rate / rate},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=rate,
        betas=(0.9, config.adam_beta2),
        fused=pretrained or None,
    )


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set every group's learning rate; `rate` is
    that of the groups without a rate of their own.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_RATIO, 1.0)
