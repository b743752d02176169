"""Our preference losses and gradients beside TRL's, on the same log-probabilities.

    pip install trl==1.16.0
    python benchmarks/preference_losses.py

Code of TRL's trainers computes its side, from random log-probabilities of tokens in
fp32. It has DPO, SimPO and, as CPO's smoothed sigmoid loss on the ratios to a
reference, RosePO with one ε for all pairs. It has no S-DPO, which with one negative is
DPO. Ends with status 1 where a loss or a gradient differs by more than 1e-6, relative.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from harness import command_line, describe_machine, machine_line, write_figures
from torch import Tensor

from ilrec_dist.objective.config import PreferenceConfig
from ilrec_dist.objective.preference import (
    DPO,
    PreferenceLoss,
    SimPO,
    SmoothedDPO,
    SoftmaxDPO,
    pair_scores,
)

BOUND = 1e-6
PAIRS, TOKENS, EPSILON = 256, 5, 0.2
# What TRL asks of the library that places its processes; there is one here.
ALONE = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
)


class Pairs:
    """Log-probabilities of tokens, [2 · PAIRS, TOKENS]: the targets' first, then the
    negatives'. Items have between 1 and TOKENS tokens; what is beyond is zero.
    """

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = 2 * PAIRS, TOKENS
        self.lengths = torch.randint(1, TOKENS + 1, shape[:1], generator=draw)
        self.mask = (torch.arange(TOKENS) < self.lengths[:, None]).long()
        self.policy = -4 * torch.rand(shape, generator=draw) * self.mask
        self.reference = -4 * torch.rand(shape, generator=draw) * self.mask

    def known(self) -> Tensor:
        """log π_ref of each target and negative, and ε: [PAIRS, 3]."""
        reference = self.reference.sum(1)
        columns = [reference[:PAIRS], reference[PAIRS:], torch.full((PAIRS,), EPSILON)]
        return torch.stack(columns, dim=1)


def ours(loss: PreferenceLoss, pairs: Pairs, policy: Tensor) -> Tensor:
    scores = pair_scores(policy.sum(1), pairs.lengths.float(), PAIRS, 1, pairs.known())
    return loss(scores).mean()


def trl_dpo(pairs: Pairs, policy: Tensor, beta: float) -> Tensor:
    from trl import DPOTrainer

    def model(**inputs: Any) -> SimpleNamespace:
        unread = torch.zeros_like(policy)
        return SimpleNamespace(
            log_probs=policy,
            entropy=unread,
            mean_logits=unread,
            is_top1=unread.bool(),
            aux_loss=None,
        )

    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ALONE,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        label_smoothing=0.0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    # One token of a prompt stands before each item.
    prompt = torch.zeros(2 * PAIRS, 1, dtype=torch.long)
    item = torch.cat([prompt, pairs.mask], dim=1)
    reference = pairs.reference.sum(1)
    inputs = {
        "input_ids": torch.zeros_like(item),
        "attention_mask": torch.ones_like(item),
        "completion_mask": item,
        "ref_chosen_logps": reference[:PAIRS],
        "ref_rejected_logps": reference[PAIRS:],
    }
    loss: Tensor = DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss


def trl_cpo(target: Tensor, negative: Tensor, beta: float, **options: Any) -> Tensor:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer: Any = SimpleNamespace(alpha=0.0, accelerator=ALONE, beta=beta, **options)
    losses: Tensor = CPOTrainer.cpo_loss(trainer, target, negative)[0]
    return losses.mean()


def trl_simpo(pairs: Pairs, policy: Tensor, beta: float, gamma: float) -> Tensor:
    mean = policy.sum(1) / pairs.lengths
    options = {"loss_type": "simpo", "simpo_gamma": gamma, "label_smoothing": 0.0}
    return trl_cpo(mean[:PAIRS], mean[PAIRS:], beta, **options)


def trl_smoothed(pairs: Pairs, policy: Tensor, beta: float) -> Tensor:
    ratio = (policy - pairs.reference).sum(1)
    options = {"loss_type": "sigmoid", "label_smoothing": EPSILON}
    return trl_cpo(ratio[:PAIRS], ratio[PAIRS:], beta, **options)


def compare(
    name: str, loss: PreferenceLoss, pairs: Pairs, theirs: Any, **options: float
) -> dict[str, Any]:
    """Both sides' loss and gradient by the tokens' log-probabilities."""
    sides = []
    for side in (lambda policy: ours(loss, pairs, policy), lambda p: theirs(pairs, p, **options)):
        policy = pairs.policy.clone().requires_grad_()
        value = side(policy)
        sides.append((float(value.detach()), torch.autograd.grad(value, policy)[0]))
    (our_loss, our_gradient), (their_loss, their_gradient) = sides
    return {
        "loss": name,
        **options,
        "ours": our_loss,
        "trl": their_loss,
        "difference": abs(our_loss - their_loss) / abs(their_loss),
        "gradient difference": float(
            (our_gradient - their_gradient).norm() / their_gradient.norm()
        ),
    }


def main() -> int:
    args = command_line(__doc__, quick=None).parse_args()
    rows = []
    for seed in range(3):
        pairs = Pairs(seed)
        for beta in (0.1, 1.0):
            config = PreferenceConfig(beta=beta)
            rows.append(compare("dpo", DPO(config), pairs, trl_dpo, beta=beta))
            one = SoftmaxDPO(config)
            rows.append(compare("sdpo, one negative", one, pairs, trl_dpo, beta=beta))
            rows.append(compare("rosepo", SmoothedDPO(config), pairs, trl_smoothed, beta=beta))
        for beta, gamma in ((2.0, 1.0), (2.5, 0.3)):
            simpo = SimPO(PreferenceConfig(beta=beta, gamma=gamma))
            rows.append(compare("simpo", simpo, pairs, trl_simpo, beta=beta, gamma=gamma))
    import trl

    machine = describe_machine(trl=trl.__version__)
    print(machine_line(machine))
    worst: dict[str, tuple[float, float]] = {}
    for row in rows:
        loss, gradient = worst.get(row["loss"], (0.0, 0.0))
        worst[row["loss"]] = (
            max(loss, row["difference"]),
            max(gradient, row["gradient difference"]),
        )
    for name, (loss, gradient) in worst.items():
        print(f"{name}: loss {loss:.1e}, gradient {gradient:.1e} (relative, the largest)")
    write_figures(args.json, {"machine": machine, "rows": rows})
    return int(max(max(pair) for pair in worst.values()) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
