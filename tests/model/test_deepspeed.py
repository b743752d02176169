"""DeepSpeed ZeRO-1 over the tensor-parallel backbone.

Losses, gradient norms and weights are the same for every tp, dp and accumulation.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ilrec_dist.distributed.deepspeed_mpu import DeepSpeedMPU, import_deepspeed
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.whole_model import full_state_dict

pytestmark = pytest.mark.slow

CONFIG = BackboneConfig(
    num_layers=2, hidden_size=32, num_heads=4, ffn_hidden_size=64, dropout=0.0, init_std=0.1
)
# The batch is cut into SHARDS pieces, over ranks or accumulation steps.
VOCAB, SHARDS, STEPS = 40, 2, 4


def full_logits(hidden: torch.Tensor, model: Backbone, state: ParallelState) -> torch.Tensor:
    """Logits over the whole vocabulary, with the gradients that the real loss has.

    The gradient of hidden is summed over tp; that of the head is local.
    """

    class Gathered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            ctx.save_for_backward(hidden, weight)
            local = (hidden @ weight.t()).float()
            shards = [torch.empty_like(local) for _ in range(state.tp)]
            dist.all_gather(shards, local, group=state.tp_group)
            return torch.cat(shards, dim=1)[:, :VOCAB]

        @staticmethod
        def backward(ctx, grad):
            hidden, weight = ctx.saved_tensors
            start, stop = model.vocab_range
            grad = F.pad(grad, (0, model.padded_vocab_size - VOCAB))[:, start:stop]
            to_hidden = grad @ weight.float()
            dist.all_reduce(to_hidden, group=state.tp_group)
            return to_hidden.to(hidden.dtype), (grad.t() @ hidden.float()).to(weight.dtype)

    return Gathered.apply(hidden, model.head_weight)


def train(mesh: Mesh, precision: str) -> dict:
    state = initialize_parallel(mesh.tp, "cpu")
    try:
        accumulation = SHARDS // state.dp
        model = Backbone(CONFIG, VOCAB, 16, precision=precision, seed=3)
        decay = [p for p in model.parameters() if p.dim() > 1]
        plain = [p for p in model.parameters() if p.dim() == 1]
        # A large eps: the key biases have no true gradient, and Adam would blow the rounding up.
        optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=1e-2,
            eps=1e-3,
        )
        engine, *_ = import_deepspeed().initialize(
            model=model,
            optimizer=optimizer,
            mpu=DeepSpeedMPU(),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": accumulation,
                "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 1.0,
                "bf16": {"enabled": precision == "bf16"},
                "communication_data_type": "fp32",
                "steps_per_print": 1 << 60,
            },
        )
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, VOCAB, (4, 9), generator=generator)
        # The pieces have 3 : 1 rows.
        pieces = [tokens[:3], tokens[3:]]
        total = tokens[:, 1:].numel()
        mine = pieces[state.dp_rank :: state.dp]
        losses, norms = [], []
        for _ in range(STEPS):
            loss_sum = torch.zeros(())
            for piece in mine:
                rows = torch.arange(piece.numel()).view(piece.shape)[:, :-1].flatten()
                logits = full_logits(engine(piece, rows).final, model, state)
                loss = F.cross_entropy(logits, piece[:, 1:].flatten(), reduction="sum") / total
                loss_sum += loss.detach()
                # DeepSpeed averages over data-parallel ranks and accumulation steps.
                engine.backward(loss * state.dp * accumulation)
                engine.step()
            dist.all_reduce(loss_sum, group=state.dp_group)
            losses.append(float(loss_sum))
            norms.append(float(engine.get_global_grad_norm()))
        weights = full_state_dict(model)
        engine.destroy()
        return {"losses": losses, "norms": norms, "weights": weights}
    finally:
        destroy_parallel()


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    return {precision: run_distributed(train, 1, 1, precision)[0] for precision in ("fp32", "bf16")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_tp_dp_and_accumulation_change_nothing(
    alone: dict[str, dict], tp: int, precision: str
) -> None:
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    one = alone[precision]
    assert one["losses"][-1] < one["losses"][0]
    for rank in run_distributed(train, 2, tp, precision):
        assert rank["losses"] == pytest.approx(one["losses"], rel=tolerance)
        assert rank["norms"] == pytest.approx(one["norms"], rel=tolerance * 5)
        for name, weight in one["weights"].items():
            assert (rank["weights"][name] - weight).norm() <= tolerance * 100 * weight.norm().clamp(
                min=1
            ), name
