"""Do two commits compute the same bits?

    python benchmarks/digests.py [--quick] [--quickstart] [--json FILE]

Run it on each commit and `diff` the two files. Printed are SHA-256 digests of
everything that a refactoring must leave alone: the operator's losses, gradients and
statistics on the tests' kind of cases, the final weights of small SFT and ILRec
trainings at tp = 1 and tp = 2, and the token rewards that those trainings read.
`--quickstart` adds the results of `configs/quickstart.yaml`, to the last digit. Digests
are comparable on one machine only: another CPU multiplies matrices in another order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import ROOT, command_line, write_figures
from ilrec_kernels import LossOptions, TokenLists, cross_layer_loss

from ilrec_dist.testing.whole_weights import whole_weights

SMALL_RUN = {
    "data.synthetic": "{users: 300, items: 120, categories: 6, mean_length: 8.0}",
    "items.levels": "2",
    "items.codes_per_level": "16",
    "cf.epochs": "2",
    "cf.hidden_size": "16",
    "cf.num_layers": "1",
    "cf.reward_cache": "true",
    "cf.rewards": "in_process",
    "backbone.num_layers": "3",
    "backbone.hidden_size": "32",
    "backbone.dropout": "0.1",
    "train.epochs": "2",
    "train.batch_size": "32",
    "train.warmup": "50",
    "train.max_history": "8",
    "train.validation_users": "50",
    "train.validate_epochs": "1",
    "launch.engine": "torchrun",
    "launch.threads": "1",
    "launch.device": "cpu",
}


def operator_digests() -> dict[str, str]:
    """One digest for each combination of backend, scopes, penalty and dtype.

    The cases have 37 rows and 61 tokens.
    """
    torch.set_num_threads(1)
    digests = {}
    scopes = ("valid_next", "item_tokens", "all")
    for backend, softmax, negatives, distill, penalty in itertools.product(
        ("reference", "torch"),
        ("all", "valid_next"),
        scopes,
        scopes,
        ("additive", "multiplicative"),
    ):
        options = LossOptions(
            vocab_size=61,
            item_tokens=(1, 58),
            softmax_scope=softmax,  # type: ignore[arg-type]
            negative_scope=negatives,  # type: ignore[arg-type]
            distill_scope=distill,  # type: ignore[arg-type]
            penalty=penalty,  # type: ignore[arg-type]
            max_negatives=5,
            crr_lambda=0.3,
            mu=0.5,
            backend=backend,
            workspace_bytes=60_000,
        )
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{backend} {softmax} {negatives} {distill} {penalty} {dtype}"
            digests[key] = operator_digest(options, dtype)
    return digests


def operator_digest(options: LossOptions, dtype: torch.dtype) -> str:
    rng = np.random.default_rng(7)
    common = rng.standard_normal((37, 16))
    hidden = [
        torch.tensor(common + 0.7 * rng.standard_normal((37, 16)), dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]
    head = torch.tensor(0.4 * rng.standard_normal((61, 16)), dtype=dtype, requires_grad=True)
    lists = [np.sort(rng.permutation(61)[: 1 + rng.integers(30)]) for _ in range(37)]
    targets = torch.tensor([int(rng.choice(tokens)) for tokens in lists])
    candidates = TokenLists(
        torch.tensor(np.cumsum([0, *map(len, lists)])), torch.tensor(np.concatenate(lists))
    )
    rewards = torch.tensor(rng.random(len(candidates.tokens)), dtype=torch.float32)
    output = cross_layer_loss(hidden[0], hidden[1:], head, targets, candidates, rewards, options)
    torch.autograd.backward(output.loss)
    tensors = [output.loss, output.cpo, output.cpd, output.crr, *vars(output.rows).values()]
    return digest([*tensors, *(value.grad for value in (*hidden, head))])


def run_digests(folder: Path, tp: int) -> dict[str, str]:
    """Train SFT and ILRec with fixed seeds.

    The digests are those of their final weights and of the cached rewards.
    """
    settings = SMALL_RUN | {
        "runs_dir": str(folder),
        "name": f"tp{tp}",
        "launch.tp": str(tp),
        "launch.workers": str(tp),
    }
    ilrec("run", *(f"{key}={value}" for key, value in settings.items()))
    run = folder / f"tp{tp}"
    digests = {
        path.parent.name: digest([tensor for _, tensor in sorted(whole_weights(path).items())])
        for path in sorted(run.glob("train/*/final"))
    }
    # Each writer has a file of values; the trainings ask for the same rewards in the same order.
    values = sorted((run / "cf").rglob("reward-cache/*/*.values"))
    digests["rewards"] = hashlib.sha256(b"".join(path.read_bytes() for path in values)).hexdigest()
    return digests


def quickstart_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of the quickstart's results.json."""
    ilrec("run", f"runs_dir={folder}", "name=quickstart")
    results = json.loads((folder / "quickstart/results.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = results["rows"]
    return rows


def ilrec(command: str, *settings: str) -> None:
    config = str(ROOT / "configs/quickstart.yaml")
    subprocess.run(
        [sys.executable, "-m", "ilrec_dist.cli", command, config, *settings], check=True, cwd=ROOT
    )


def digest(tensors: list[Any]) -> str:
    """SHA-256 of the bytes of all tensors that are not None."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            sha256.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def main() -> None:
    parser = command_line(__doc__, "the operator's digests alone")
    parser.add_argument("--quickstart", action="store_true", help="also run the quickstart")
    arguments = parser.parse_args()
    digests: dict[str, Any] = {"operator": operator_digests()}
    with tempfile.TemporaryDirectory() as folder:
        for tp in () if arguments.quick else (1, 2):
            digests[f"run tp={tp}"] = run_digests(Path(folder), tp)
        if arguments.quickstart:
            digests["quickstart"] = quickstart_rows(Path(folder))
    print(json.dumps(digests, indent=2))
    # Neither the machine nor the commit is written: the files of two commits are to be equal.
    write_figures(arguments.json, digests)


if __name__ == "__main__":
    main()
