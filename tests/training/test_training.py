"""The training loop: losses and weights do not
depend on how the step is cut (METHOD.md §8).

They are the same over tp, dp and accumulation, and after an interruption.
"""

import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import write_json
from ilrec_dist.common.manifest import with_checksum
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.pipeline.execute import execute, open_run
from ilrec_dist.reporting.metrics_log import MetricsLog, read_metrics
from ilrec_dist.testing.distributed import Mesh, run_distributed
from ilrec_dist.testing.whole_weights import whole_weights
from ilrec_dist.training import checkpoint
from tests.support.tiny_run import losses_of, tiny_config, train_here

pytestmark = pytest.mark.slow

# Each layout is (world size, tp, how a step is cut).
LAYOUTS = [
    (1, 1, {}),
    (2, 2, {}),
    (2, 1, {}),
    (1, 1, {"accumulation_steps": 3}),
    (4, 2, {"accumulation_steps": 2}),
    (2, 2, {"micro_batch_tokens": 60}),
    (2, 1, {"micro_batch_tokens": 40, "zero_stage": 2}),
]


def refusal_here(
    mesh: Mesh, tree: dict, method: str, folder: str, items_per_user: int | None = None
) -> str:
    """The line that refuses the training on this rank; histories may be cut short."""
    try:
        train_here(mesh, tree, method, folder, items_per_user=items_per_user)
    except UserError as error:
        return str(error)
    return "not refused"


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The folder of an ilrec training under each layout.

    Dropout is off, because data-parallel ranks would draw differently.
    """
    root = tmp_path_factory.mktemp("layouts")
    folders = []
    for number, (world, tp, cut) in enumerate(LAYOUTS):
        sections = {
            "launch": {"workers": world, "tp": tp},
            "train": cut,
            "backbone": {"dropout": 0.0},
        }
        config = config_to_dict(tiny_config(tiny, **sections))
        folder = root / str(number)
        folders.append(folder)
        run_distributed(train_here, world, tp, config, "ilrec", str(folder))
    return folders


@pytest.mark.parametrize("number", range(1, len(LAYOUTS)), ids=lambda n: str(LAYOUTS[n]))
def test_the_layout_of_the_step_changes_neither_losses_nor_weights(trained, number):
    alone, other = trained[0], trained[number]
    expected, found = losses_of(alone), losses_of(other)
    assert len(expected) == len(found) > 10
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    weights = whole_weights(other / "final")
    for name, tensor in whole_weights(alone / "final").items():
        # Key biases have no true gradient: Adam walks them by rounding alone.
        if not name.endswith("linear_qkv.bias"):
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=5e-3)


def test_training_learns_and_logs_what_the_method_names(trained):
    folder = trained[0]
    lines = [line for line in read_metrics(folder) if "loss/total" in line]
    assert lines[-1]["loss/cpo"] < lines[0]["loss/cpo"] - 0.2
    for key in (
        "negatives/mean",
        "negatives/empty",
        "negatives/capped",
        "p_target",
        "loss/cpd/pos1",
        "negatives/mean/pos0",
        "kl/layer1",
        "rate/tokens_per_second",
    ):
        assert key in lines[0]
    # Nothing here is on a GPU.
    assert not any("gpu" in key or "mfu" in key for key in lines[0])
    assert (
        lines[0]["negatives/mean/pos0"] > 0
        and max(line["rewards/coverage"] or 0 for line in lines) > 0.5
    )
    assert lines[0]["loss/total"] == pytest.approx(
        lines[0]["loss/cpo"] + 0.1 * lines[0]["loss/cpd"] + 0.02 * lines[0]["loss/crr"]
    )
    assert any("validation/ndcg@10" in line for line in read_metrics(folder))
    assert whole_weights(folder / "best").keys() == whole_weights(folder / "final").keys()


@pytest.mark.parametrize(("world", "stage"), [(2, 1), (4, 3)])
def test_sequence_parallelism_changes_neither_losses_nor_weights(
    trained, tiny, tmp_path, world, stage
):
    """Beside recomputation and ZeRO 3 too; compared with tp 2 alone."""
    sections = {
        "launch": {"workers": world, "tp": 2, "sequence_parallel": True},
        "train": {"recompute": True, "zero_stage": stage},
        "backbone": {"dropout": 0.0},
    }
    config = config_to_dict(tiny_config(tiny, **sections))
    run_distributed(train_here, world, 2, config, "ilrec", str(tmp_path))
    whole = trained[LAYOUTS.index((2, 2, {}))]
    np.testing.assert_allclose(losses_of(tmp_path), losses_of(whole), rtol=1e-5)
    weights = whole_weights(tmp_path / "final")
    for name, expected in whole_weights(whole / "final").items():
        # Key biases have no true gradient: Adam walks them by rounding alone.
        if not name.endswith("linear_qkv.bias"):
            assert (weights[name] - expected).norm() <= 1e-5 * expected.norm(), name


def seed_after_training(mesh: Mesh, tree: dict, folder: str) -> int:
    """What dropout was seeded with at the last step."""
    train_here(mesh, tree, "sft", folder)
    return torch.initial_seed()


def test_tp_ranks_draw_other_dropout_for_tokens_of_their_own(tiny, tmp_path):
    launch = {"workers": 2, "tp": 2, "sequence_parallel": True}
    config = config_to_dict(tiny_config(tiny, launch=launch, train={"epochs": 1}))
    seeds = run_distributed(seed_after_training, 2, 2, config, str(tmp_path))
    assert len(set(seeds)) == 2
    losses = losses_of(tmp_path)
    assert losses[-1] < losses[0] - 0.1


def test_tp_ranks_draw_the_same_dropout(tiny, tmp_path):
    found = []
    for world in (1, 2):
        config = config_to_dict(
            tiny_config(tiny, launch={"workers": world, "tp": world}, train={"epochs": 1})
        )
        run_distributed(train_here, world, world, config, "sft", str(tmp_path / str(world)))
        found.append(losses_of(tmp_path / str(world)))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_training_ends_with_the_same_bits(tiny, tmp_path, precision):
    config = config_to_dict(tiny_config(tiny, train={"precision": precision}))
    run_distributed(train_here, 1, 1, config, "ilrec", str(tmp_path / "whole"))
    run_distributed(train_here, 1, 1, config, "ilrec", str(tmp_path / "cut"), 6)
    assert sorted(p.name for p in (tmp_path / "cut/checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
    ]
    run_distributed(train_here, 1, 1, config, "ilrec", str(tmp_path / "cut"))
    whole, cut = (whole_weights(tmp_path / name / "final") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    # They are as the model computes with them.
    assert {str(one.dtype)[6:] for one in whole.values()} == {
        {"fp32": "float32", "bf16": "bfloat16"}[precision]
    }
    steps = [line["step"] for line in read_metrics(tmp_path / "cut") if "loss/total" in line]
    assert steps == sorted(set(steps)) and steps == [
        line["step"] for line in read_metrics(tmp_path / "whole") if "loss/total" in line
    ]


def test_a_training_goes_on_under_other_layouts_with_the_same_losses(tiny, tmp_path):
    """From tp 2 to one process, to four with tp 2 and dp 2, to four with tp 4."""
    folder, alone = tmp_path / "elastic", tmp_path / "alone"
    sections = {
        "backbone": {"dropout": 0.0},
        "train": {"epochs": 1, "batch_size": 6, "checkpoint_steps": 4, "validation_users": 4},
    }
    config = config_to_dict(tiny_config(tiny, **sections))
    last = 16
    run_distributed(train_here, 1, 1, config, "ilrec", str(alone), last)
    for world, tp, stop in ((2, 2, 2), (1, 1, 4), (4, 2, 6), (4, 4, last)):
        config = config_to_dict(tiny_config(tiny, **sections, launch={"workers": world, "tp": tp}))
        run_distributed(train_here, world, tp, config, "ilrec", str(folder), stop)
        # Each rank has written its own part.
        parts = list((folder / f"checkpoints/step-{stop:08d}").glob("part-*.safetensors"))
        assert len(parts) == world
    expected, found = losses_of(alone), losses_of(folder)
    # Ten come after the last change.
    assert len(expected) == len(found) == last
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_recomputed_activations_give_the_same_bits(tiny, tmp_path):
    """Dropout is drawn again as it was."""
    for name, recompute in (("kept", False), ("again", True)):
        train = {"epochs": 1, "recompute": recompute}
        config = config_to_dict(tiny_config(tiny, train=train))
        run_distributed(train_here, 1, 1, config, "sft", str(tmp_path / name))
    kept, again = (whole_weights(tmp_path / name / "final") for name in ("kept", "again"))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_2_trains_as_zero_1_does(tiny, tmp_path, precision):
    for stage in (1, 2):
        sections = {
            "launch": {"workers": 2},
            "train": {"zero_stage": stage, "accumulation_steps": 2, "precision": precision},
            "backbone": {"dropout": 0.0},
        }
        config = config_to_dict(tiny_config(tiny, **sections))
        run_distributed(train_here, 2, 1, config, "sft", str(tmp_path / str(stage)))
    losses = [losses_of(tmp_path / str(stage)) for stage in (1, 2)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-4 if precision == "fp32" else 4e-2)


def accumulated_norm(mesh: Mesh, tree: dict) -> float:
    """The norm of the gradient of three micro-batches:
    the first, and twice its 512th part.
    """
    from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
    from ilrec_dist.training.engine import build_engine

    config = config_from_dict(tree).train
    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        engine = build_engine(torch.nn.Linear(1, 1, bias=False), config, parallel)
        for x in (1.0, 2**-9, 2**-9):
            engine.backward(engine(torch.full((1, 1), x, dtype=torch.bfloat16)).sum())
            engine.step()
        return float(engine.get_global_grad_norm())
    finally:
        destroy_parallel()


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_gradients_are_summed_over_micro_batches_in_fp32(tiny, stage):
    """In bf16 1 + 2⁻⁹ + 2⁻⁹ is 1. The engine divides by the number of micro-batches."""
    train = {"precision": "bf16", "accumulation_steps": 3, "zero_stage": stage}
    launch = {"workers": stage}
    tree = config_to_dict(tiny_config(tiny, train=train, launch=launch))
    for norm in run_distributed(accumulated_norm, stage, 1, tree):
        assert norm == pytest.approx(float(torch.tensor(1 / 3).bfloat16()) * (1 + 2**-8), rel=1e-3)


def steps_at_stake(mesh: Mesh, tree: dict, folder: str) -> list[int]:
    """How many steps a death would cost after each; checkpoints are committed late."""
    found = []
    put_in_place, write = checkpoint.put_in_place, MetricsLog.write

    def put_late(staged: Path, path: Path) -> None:
        time.sleep(0.3)
        put_in_place(staged, path)

    def note(log: MetricsLog, step: int, epoch: float, values: dict) -> None:
        kept = [int(path.name[-8:]) for path in checkpoint.committed(Path(folder) / "checkpoints")]
        found.append(step - max(kept, default=0))
        write(log, step, epoch, values)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "put_in_place", put_late)
        patched.setattr(MetricsLog, "write", note)
        train_here(mesh, tree, "sft", folder, waits=False)
    return found


def test_a_death_costs_at_most_the_steps_that_are_set(tiny, tmp_path):
    train = {"batch_size": 6, "checkpoint_steps": 6, "epochs": 1}
    tree = config_to_dict(tiny_config(tiny, train=train))
    (found,) = run_distributed(steps_at_stake, 1, 1, tree, str(tmp_path))
    # The training does go on while a checkpoint is written.
    assert len(found) > 20 and 3 < max(found) <= 6


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tiny, tmp_path, capfd):
    config = config_to_dict(tiny_config(tiny))
    run_distributed(train_here, 1, 1, config, "ilrec", str(tmp_path / "whole"))
    run_distributed(train_here, 1, 1, config, "ilrec", str(tmp_path / "cut"), 6)
    folder = tmp_path / "cut/checkpoints"
    shutil.copytree(folder, tmp_path / "copy")
    victim = next(path for path in sorted((folder / "step-00000006").rglob("*.safetensors")))
    _flip(victim)
    found, damaged = checkpoint.latest(folder, "test")
    assert found.step == 3 and str(victim) in damaged[0] and "SHA-256" in damaged[0]
    run_distributed(train_here, 1, 1, config, "ilrec", str(tmp_path / "cut"))
    whole, cut = (whole_weights(tmp_path / name / "final") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    with pytest.raises(UserError, match="another configuration"):
        checkpoint.latest(tmp_path / "copy", "other")
    for path in (tmp_path / "copy").rglob("*.safetensors"):
        _flip(path)
    with pytest.raises(UserError, match="no earlier checkpoint"):
        checkpoint.latest(tmp_path / "copy", "test")


def test_a_command_warns_once_of_a_damaged_checkpoint(tiny, tmp_path, capfd, started_workers):
    """Before its workers begin, which find the same."""
    shutil.copytree(tiny / "tiny", tmp_path / "tiny")
    sections = {"train": {"methods": ["sft"], "epochs": 1, "checkpoint_steps": 3}}
    config = tiny_config(tmp_path, **sections)
    run, name = open_run(config), "train sft seed 0"
    fingerprint, training = run.fingerprint(name), tmp_path / "tiny/train/sft-seed0"
    stop = (6, None, fingerprint)
    run_distributed(train_here, 1, 1, config_to_dict(config), "sft", str(training), *stop)
    newest = max((training / "checkpoints").iterdir())
    _flip(next(newest.rglob("*.safetensors")))
    write_json(run.begun_file(name), {"fingerprint": fingerprint})
    execute(config, "train")
    printed = "".join(capfd.readouterr()).replace("\n", " ")
    assert printed.count("the checkpoint before it is used") == 1 and newest.name in printed


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_of_a_checkpoints_manifest_is_named(tmp_path: Path, bit: int) -> None:
    path = tmp_path / "step-00000002" / checkpoint.MANIFEST
    for step in (1, 2):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        state = {"step": step, "best_ndcg": -1.0, "best_sha256": "", "seconds": 0.5}
        contents = {"format": checkpoint.FORMAT, "step": step, "fingerprint": "f0", "state": state}
        # Of no part: the manifest alone is looked at.
        layout = {"tp": 1, "step": 2.0, "shapes": {}}
        written = with_checksum({**contents, "layout": layout, "sha256": {}})
        (folder / checkpoint.MANIFEST).write_text(json.dumps(written, indent=1))
    whole = path.read_bytes()
    assert checkpoint.latest(tmp_path, "f0")[0].step == 2
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        found, damaged = checkpoint.latest(tmp_path, "f0")
        assert found.step == 1 and str(path) in damaged[0], whole[place:]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("world", "tp"), [(2, 1), (2, 2)])
def test_a_loss_that_is_not_finite_is_one_line_on_every_rank(tiny, tmp_path, world, tp):
    train = {"learning_rate": 1e30, "max_bad_steps": 0}
    tree = config_to_dict(tiny_config(tiny, train=train, launch={"workers": world, "tp": tp}))
    lines = run_distributed(refusal_here, world, tp, tree, "ilrec", str(tmp_path))
    assert len(set(lines)) == 1
    for part in ("ilrec, seed 0", "step 2", "loss term cpo is nan", "1e+30", "learning_rate"):
        assert part in lines[0]
    # Neither a best epoch nor a result came of it.
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "result.json").exists()


def test_nothing_to_train_on_is_one_line(tiny, tmp_path):
    """Of three items, two are the validation and
    test targets, and the first is no target.
    """
    tree = config_to_dict(tiny_config(tiny))
    (line,) = run_distributed(refusal_here, 1, 1, tree, "sft", str(tmp_path), 3)
    assert line.startswith("sft, seed 0: no user has two training items")


def test_result_names_the_hashes_of_the_weights(trained):
    """Of the manifests; tests/model/test_weights.py damages what they name."""
    for folder, parts in zip(trained[:3], (1, 2, 2), strict=True):
        assert json.loads((folder / "result.json").read_text())["weights_sha256"] == {
            name: hashlib.sha256((folder / name / "manifest.json").read_bytes()).hexdigest()
            for name in ("best", "final")
        }
        for name in ("best", "final"):
            # Each rank has written a part.
            assert len(list((folder / name).glob("*.safetensors"))) >= parts


def test_best_weights_newer_than_the_checkpoint_are_chosen_again(tiny, tmp_path):
    """As after a kill between the two: what the checkpoint names is gone."""
    config = config_to_dict(tiny_config(tiny))
    # Past the end of the first epoch, which has 7 steps.
    run_distributed(train_here, 1, 1, config, "sft", str(tmp_path), 9)
    path = tmp_path / "checkpoints/step-00000009/manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["state"]["best_step"] == 7
    shutil.rmtree(tmp_path / "best")
    # No later validation is as good, so that this one alone would be kept.
    manifest["state"]["best_ndcg"] = 2.0
    path.write_text(json.dumps(manifest))
    run_distributed(train_here, 1, 1, config, "sft", str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["best_step"] > 7 and result["best_ndcg"] < 2
    best = hashlib.sha256((tmp_path / "best/manifest.json").read_bytes()).hexdigest()
    assert result["weights_sha256"]["best"] == best
