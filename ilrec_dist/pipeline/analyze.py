"""Why a method gains or not: what its negatives are, what its terms push, who gains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ilrec_dist.cf.sasrec.checkpoint import load_cf
from ilrec_dist.cf.sasrec.model import encode
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object, write_json
from ilrec_dist.common.run_layout import ANALYSIS, BEST, RESULT, WEIGHTS_SHA256, RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.evaluation.baselines.counting import count_training
from ilrec_dist.evaluation.breakdown import as_rows, group_gains, user_splits
from ilrec_dist.evaluation.layer_agreement import layer_agreement
from ilrec_dist.evaluation.negatives_analysis import (
    PLAUSIBLE_ITEMS,
    candidates_but_target,
    is_below,
    negatives_of_rows,
    term_gradients,
    without_nan,
)
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.evaluation.ranking import evaluate_model
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.objective.registry import default_method, get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.prompting import target_batches
from ilrec_dist.pipeline.reward_source import open_reward_source
from ilrec_dist.pipeline.run_config import run_config
from ilrec_dist.pipeline.stages.evaluate import predictions_file
from ilrec_dist.pipeline.trained_model import TrainedModel, open_trained_model
from ilrec_dist.samples.targets import ChosenTargets
from ilrec_dist.samples.windows import StepOrder

# Sequences of training windows whose gradients are compared.
GRADIENT_WINDOWS = 64
# Validation users whose rows are looked at together.
BATCH_USERS = 128


def analyze(run: Path, method: str | None, seed: int | None, users: int) -> dict[str, Any]:
    """Analyse a finished, evaluated run on a sample
    of validation users; writes analysis.json.

    method and seed as in `open_trained_model`. Raises UserError
    for a folder without them, and for items that are titles.
    """
    if users < 1:
        raise UserError(f"--users {users}: expected at least 1")
    config = run_config(run)
    name = get_method(method or default_method(config.train.methods)).name
    if config.items.form == "titles":
        raise UserError(
            f"{run}: its items are titles, and the analysis is by position in codes of one "
            "length; expected items.form semantic or atomic"
        )
    with open_trained_model(run, name, seed) as trained:
        seed = config.train.seeds[0] if seed is None else seed
        analysis: dict[str, Any] = {
            "method": name,
            "seed": seed,
            "weights": best_weights_sha256(RunFolders(config.run_dir), name, seed),
            "gains": gains(config, trained.artifacts, name),
            "positions": positions(trained, name, users),
        }
        objective = get_method(name).objective(config.objective)
        if not objective.is_cross_entropy:
            analysis["gradients"] = gradients(trained, name, seed)
    write_json(run / ANALYSIS, analysis)
    return analysis


def best_weights_sha256(folders: RunFolders, method: str, seed: int) -> str:
    """The SHA-256 of the manifest of a training's best
    weights, by which an analysis is known to be of them.
    """
    result = read_json_object(folders.training(method, seed) / RESULT)
    sha256: str = result[WEIGHTS_SHA256][BEST]
    return sha256


def gains(config: Config, artifacts: RunArtifacts, name: str) -> list[Mapping[str, Any]]:
    """NDCG@10 on the test split by groups of users,
    against what the method is compared with.

    A user's value is the mean over seeds.
    """
    versus = [other for other in get_method(name).compared_with if other in config.train.methods]
    if not versus:
        return []
    exclude = config.evaluation.exclude_seen
    values = []
    for method in (name, versus[0]):
        predictions = [
            Predictions.load(predictions_file(config, method, seed, exclude))
            for seed in config.train.seeds
        ]
        values.append(np.mean([of_seed.per_user()["ndcg@10"] for of_seed in predictions], axis=0))
    users, targets = predictions[0].users, predictions[0].targets
    lengths = artifacts.dataset.target_positions("test", users)
    popularity = count_training(artifacts.dataset).popularity
    splits = user_splits(targets, lengths, popularity, artifacts.catalogue)
    rows = as_rows(group_gains(splits, *values))
    return [{**row, "versus": versus[0], "versus_value": row["versus"]} for row in rows]


def positions(trained: TrainedModel, name: str, count: int) -> list[dict[str, Any]]:
    """What holds at each position in the item, over validation users' targets."""
    artifacts, config = trained.artifacts, trained.config
    users = artifacts.validation_users(count)
    objective_config = get_method(name).objective(config.objective)
    objective = CrossLayerObjective.build(
        trained.backbone, objective_config, artifacts.catalogue, trained.parallel
    ).eval()
    reads_negatives = objective_config.beta > 0 or objective_config.crr_lambda > 0
    depth = artifacts.catalogue.depth
    chosen = ChosenTargets.of_split(
        artifacts.dataset, users, "validation", config.train.max_history
    )
    maker = target_batches(config, artifacts, artifacts.dataset, chosen)
    beams = _beams(trained, users) if reads_negatives else None
    sums: dict[str, np.ndarray] = {}
    for first in range(0, len(users), BATCH_USERS):
        ids = np.arange(first, min(first + BATCH_USERS, len(users)))
        batch = maker.make(ids, 1)
        shares = {"rows": np.ones(len(batch.rows))}
        for layer, same in layer_agreement(trained.backbone, batch, trained.parallel).items():
            shares[f"agreement/layer{layer}"] = same.cpu().numpy().astype(float)
        totals = {key: value.reshape(-1, depth).sum(0) for key, value in shares.items()}
        if beams is not None:
            items = artifacts.dataset.targets("validation", users[ids]).astype(np.int64)
            negatives = negatives_of_rows(objective, batch)
            other_candidates = candidates_but_target(batch)
            plausible = _plausible_items(artifacts, users[ids])
            for key, pairs, lists in (
                ("negatives", negatives, None),
                ("others", other_candidates, None),
                ("plausible", negatives, plausible),
                ("plausible_others", other_candidates, plausible),
                ("in_beams", negatives, beams[ids]),
                ("others_in_beams", other_candidates, beams[ids]),
            ):
                flags = np.ones(len(pairs.row))
                if lists is not None:
                    flags = is_below(artifacts.trie, items, pairs, lists).astype(float)
                totals[key] = np.bincount(pairs.row % depth, flags, minlength=depth)
            empty = ~np.isin(np.arange(len(batch.rows)), negatives.row)
            totals["empty"] = empty.reshape(-1, depth).sum(0)
        for key, value in totals.items():
            sums[key] = sums.get(key, 0) + value
    return [
        _position(p, {key: float(value[p]) for key, value in sums.items()}) for p in range(depth)
    ]


def _position(number: int, sums: Mapping[str, float]) -> dict[str, Any]:
    """The figures of one position from its sums over rows."""
    rows = sums["rows"]
    figures = {key: value / rows for key, value in sums.items() if key.startswith("agreement/")}
    if "negatives" in sums:
        figures |= {
            "mean_negatives": sums["negatives"] / rows,
            "empty": sums["empty"] / rows,
            "candidates": sums["others"] / rows,
        }
        for key, part, whole in (
            ("plausible", "plausible", "negatives"),
            ("plausible_of_candidates", "plausible_others", "others"),
            ("in_beams", "in_beams", "negatives"),
            ("in_beams_of_candidates", "others_in_beams", "others"),
        ):
            figures[key] = sums[part] / sums[whole] if sums[whole] else float("nan")
    return {"position": number, "rows": int(rows), **without_nan(figures)}


def _beams(trained: TrainedModel, users: np.ndarray) -> np.ndarray:
    """int64 [n, W]: the final beams for the
    users' validation targets, padded with -1.
    """
    predictions = evaluate_model(
        trained.ranker,
        trained.artifacts.dataset,
        users=users,
        split="validation",
        exclude_seen=trained.config.evaluation.exclude_seen,
    )
    return predictions.items.astype(np.int64)


@torch.no_grad()
def _plausible_items(artifacts: RunArtifacts, users: np.ndarray) -> np.ndarray:
    """int64 [n, K]: the collaborative model's best items at the validation targets.

    The model on all users saw their training items alone.
    """
    model, dataset = load_cf(artifacts.folders.cf), artifacts.dataset
    starts, stops = dataset.offsets[users], dataset.target_positions("validation", users)
    queries = encode(model, dataset.items, starts, stops)
    scores = model.items.logits(queries).masked_fill(~model.known, -torch.inf)
    best = scores.topk(min(PLAUSIBLE_ITEMS, scores.shape[1]), dim=1).indices
    best_nodes: np.ndarray = best.cpu().numpy()
    return best_nodes


def gradients(trained: TrainedModel, name: str, seed: int) -> dict[str, Any]:
    """The size of each term's gradient on training windows, by position in the item."""
    artifacts, config = trained.artifacts, trained.config
    objective_config = get_method(name).objective(config.objective)
    objective = CrossLayerObjective.build(
        trained.backbone, objective_config, artifacts.catalogue, trained.parallel
    ).eval()
    windows = artifacts.training_windows(config.train)
    order = StepOrder(windows, GRADIENT_WINDOWS, 1, seed)
    maker = target_batches(config, artifacts, artifacts.training, windows)
    batch = maker.make(order.sample_ids(0), 1)
    rewards = None
    if objective_config.crr_lambda > 0:
        future = open_reward_source(artifacts).fetch_async(batch.users, batch.positions)
        rewards = torch.from_numpy(np.asarray(future.result(), np.float32))
        rewards = rewards.to(trained.parallel.device)
    whole, *parts = term_gradients(objective, batch, rewards, artifacts.catalogue.depth)
    return {"all": whole, "positions": parts}
