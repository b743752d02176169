"""What is logged of how well a training uses its GPUs; nothing on CPUs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.model.flops import Trained, Work, training_flops
from ilrec_dist.model.utilisation import mfu, peak_of
from ilrec_dist.objective.objective import Objective
from ilrec_dist.training.config import TrainConfig


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


class GPURates:
    """Tokens/s of a GPU and, where the peak of this GPU is known, the MFU.

    The operations are reckoned as `ilrec plan` does: each stream of hidden rows has
    logits for the whole vocabulary, and a token attends to half of its sequence.
    Nothing here asks the GPU for anything.
    """

    def __init__(
        self, objective: Objective, config: TrainConfig, catalogue: Catalogue, step: int
    ) -> None:
        """step: how many have been done."""
        backbone = objective.backbone
        self.gpu, self.gpus = gpu_name(objective.parallel.device), dist.get_world_size()
        # The peaks are those of bf16.
        is_known = self.gpu is not None and config.precision == "bf16"
        self.peak = peak_of(self.gpu or "") if is_known else None
        self.step = step
        self.backbone, self.batch_size = backbone.config, config.batch_size
        self.columns = [backbone.padded_vocab_size] * objective.streams
        first, last = catalogue.vocabulary.added_tokens
        self.trained = Trained(
            all_weights=config.trainable == "full",
            lora=None if backbone.lora is None else config.lora,
            new_rows=last - first if config.trainable.endswith("new_rows") else 0,
        )

    def report(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """From the values of a line that is logged after this step."""
        sequences = max(1, step - self.step) * self.batch_size
        self.step = step
        if self.gpu is None:
            return {}
        rates = {"rate/tokens_per_second_per_gpu": values["rate/tokens_per_second"] / self.gpus}
        if self.peak is not None:
            work = Work(values["tokens"], values["tokens"] / sequences / 2, values["rows"])
            done = training_flops(self.backbone, work, self.columns, self.trained)
            rates["rate/mfu"] = mfu(done, values["time/all"], self.peak, self.gpus)
        return rates
