"""DeepSpeed ZeRO-1 and AdamW under the Megatron groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ilrec_dist.distributed.deepspeed_mpu import DeepSpeedMPU, import_deepspeed
from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.training.config import TrainConfig


def deepspeed_config(config: TrainConfig, dp: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for `dp` data-parallel ranks."""
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // (dp * config.accumulation_steps),
        "gradient_accumulation_steps": config.accumulation_steps,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if config.precision == "bf16" else {}),
        "communication_data_type": "fp32",
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }


def build_engine(module: nn.Module, config: TrainConfig, parallel: ParallelState) -> Any:
    """Wrap the module for training.

    The engine averages gradients over data-parallel ranks and micro-batches, so a loss that is
    a sum over rows must come scaled by dp × accumulation_steps / N (METHOD.md §6).
    """
    engine, *_ = import_deepspeed().initialize(
        model=module,
        optimizer=adamw(module, config),
        config=deepspeed_config(config, parallel.dp),
        mpu=DeepSpeedMPU(),
        dist_init_required=False,
    )
    return engine


def adamw(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW whose weight decay applies to matrices, not to vectors (norms, biases)."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, config.adam_beta2)
    )
