"""What lies in a checkpoint: files of torch's distributed checkpoint, no pickles."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.manifest import with_checksum
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.sharding import RowRangeSpec, ShardSpec, mark_parallel
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.testing.distributed import Mesh, run_distributed
from ilrec_dist.testing.measured_step import SmallTraining, StepSpec
from ilrec_dist.training import checkpoint
from ilrec_dist.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Layout,
    Part,
    write_part,
)
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.optimizer_state import Fragment, SavedState, take_part

SPEC = StepSpec(
    BackboneConfig(num_layers=2, hidden_size=32, num_heads=4, dropout=0.0),
    ObjectiveConfig(),
    TrainConfig(batch_size=8, precision="bf16"),
    vocab_size=97,
    items=3,
    depth=2,
)


def train_and_write(mesh: Mesh, spec: StepSpec, folder: str) -> dict[str, Tensor]:
    """Write a checkpoint after two steps. Returns the whole master
    weights and moments, as DeepSpeed gathers them.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    training = SmallTraining(mesh, spec)
    for _ in range(2):
        training.step()
    writer = CheckpointWriter(Path(folder), "f", 2, mesh.rank, 2, 60.0)
    take = training.engine, training.objective, training.parallel
    writer.begin(2, {}, lambda: take_part(*take))
    writer.wait()
    whole = {}
    for name, parameter in training.objective.named_parameters():
        whole[f"weight/{name}"] = safe_get_full_fp32_param(parameter).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            value = safe_get_full_optimizer_state(parameter, moment)
            whole[f"{moment}/{name}"] = value.clone()
    training.close()
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_torch_alone_reads_the_state_that_two_ranks_wrote(tmp_path: Path, stage: int) -> None:
    spec = dataclasses.replace(SPEC, train=dataclasses.replace(SPEC.train, zero_stage=stage))
    expected, _ = run_distributed(train_and_write, 2, 1, spec, str(tmp_path))
    folder = tmp_path / "step-00000002"
    shapes = json.loads((folder / "manifest.json").read_text())["layout"]["shapes"]
    assert {f"weight/{name}" for name in shapes} == {
        f"{name}/tp-0-of-1" for name in expected if name.startswith("weight/")
    }
    state = {
        f"{kind}/{name}": torch.full([math.prod(shape)], torch.nan)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    for name, values in expected.items():
        assert torch.equal(state[f"{name}/tp-0-of-1"], values.flatten()), name

    # Each file is what it says, and none a pickle, whichever name a pickle may have.
    files = sorted(path.name for path in folder.rglob("*"))
    assert files == ["manifest.json", "part-00000.safetensors", "part-00001.safetensors"]
    for name in files[1:]:
        with safe_open(folder / name, framework="pt") as file:
            assert set(file.keys()) <= set(state)


def test_a_part_has_what_torch_would_write_in_the_same_bytes_every_time(tmp_path: Path) -> None:
    tensors = {"exp_avg/a": torch.arange(5.0), "weight/a": torch.arange(7.0)}
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    (theirs,) = tmp_path.glob("*.safetensors")
    ours = tmp_path / "part"
    part = Part(tensors, dict.fromkeys(tensors, 0), Layout(1, 1.0, {}))
    write_part(part, ours)
    infos = []
    for path in (ours, theirs):
        with safe_open(path, framework="pt") as file:
            infos.append(json.loads(file.metadata()["DCP_SHARDING_INFO"]))
            assert file.keys() == sorted(tensors)
            assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
    assert infos[0] == infos[1]
    written = {ours.read_bytes()}
    for _ in range(8):
        write_part(part, ours)
        written.add(ours.read_bytes())
    assert len(written) == 1


def test_a_checkpoint_of_an_earlier_version_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000002"
    folder.mkdir()
    contents = {"format": checkpoint.FORMAT - 1, "step": 2, "fingerprint": "f", "state": {}}
    written = with_checksum({**contents, "sha256": {}})
    (folder / checkpoint.MANIFEST).write_text(json.dumps(written))
    with pytest.raises(UserError, match=f"{folder}: written by another version"):
        checkpoint.latest(tmp_path, "f")


def committed_checkpoint(folder: Path, step: int, keep: int = 2) -> Path:
    """Commit a checkpoint of one rank, a part of one tensor."""
    writer = CheckpointWriter(folder, "f", keep, 0, 1, 60.0)
    staged = checkpoint.staging_folder(folder, step)
    checkpoint.make_staging_folder(staged)
    layout = Layout(1, 1.0, {"a/tp-0-of-1": [4]})
    part = Part({"weight/a/tp-0-of-1": torch.arange(4.0)}, {"weight/a/tp-0-of-1": 0}, layout)
    writer._write(step, part)
    writer._commit(step, {})
    return folder / f"step-{step:08d}"


def is_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def is_lost_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere")


@pytest.mark.parametrize("damage", [is_folder, is_lost_link])
@pytest.mark.parametrize("name", [checkpoint.MANIFEST, "part-00000.safetensors"])
def test_what_cannot_be_read_is_passed_over_by_name(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    newest = [committed_checkpoint(tmp_path, step) for step in (2, 4)][-1]
    damage(newest / name)
    found, (line,) = checkpoint.latest(tmp_path, "f")
    assert found is not None
    assert found.step == 2
    assert line.startswith(f"{newest / name}: missing, ")


def test_deeply_nested_json_in_place_of_a_manifest_is_passed_over(tmp_path: Path) -> None:
    newest = [committed_checkpoint(tmp_path, step) for step in (2, 4)][-1]
    (newest / checkpoint.MANIFEST).write_text("[" * 100_000)
    found, (line,) = checkpoint.latest(tmp_path, "f")
    assert found is not None
    assert found.step == 2
    assert line.startswith(f"{newest / checkpoint.MANIFEST}: missing, malformed")


def test_a_copy_is_left_alone_and_a_renamed_checkpoint_is_passed_over(tmp_path: Path) -> None:
    newest = [committed_checkpoint(tmp_path, step) for step in (2, 4)][-1]
    copy = tmp_path / "step-00000004.copy"
    shutil.copytree(newest, copy)
    newest.rename(tmp_path / "step-00000009")
    found, (line,) = checkpoint.latest(tmp_path, "f")
    assert found is not None
    assert found.step == 2
    manifest = tmp_path / "step-00000009" / checkpoint.MANIFEST
    assert line == f"{manifest}: of step 4, so not of this folder"
    committed_checkpoint(tmp_path, 5)
    committed_checkpoint(tmp_path, 6)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["step-00000004.copy", "step-00000005", "step-00000006"]


def test_damaged_checkpoints_are_not_kept_in_the_place_of_whole_ones(tmp_path: Path) -> None:
    whole, *damaged = [committed_checkpoint(tmp_path, step, keep=3) for step in (2, 6, 8)]
    for folder in damaged:
        (folder / checkpoint.MANIFEST).unlink()
    following = committed_checkpoint(tmp_path, 4, keep=2)
    assert checkpoint.committed(tmp_path) == [whole, following]


def test_a_parameter_of_other_tp_is_joined_and_cut_or_refused_by_name(tmp_path: Path) -> None:
    """A matrix [6, 2] of two shards, each of which two ranks wrote."""
    whole = torch.arange(12.0).view(6, 2)
    layout = Layout(2, 1.0, {f"a/tp-{rank}-of-2": [3, 2] for rank in range(2)})
    for rank, shard in enumerate(whole.chunk(2)):
        for number, (start, stop) in enumerate([(0, 4), (4, 6)]):
            name = f"weight/a/tp-{rank}-of-2"
            part = Part({name: shard.flatten()[start:stop]}, {name: start}, layout)
            write_part(part, tmp_path / f"part-{rank}-{number}.safetensors")
    saved = SavedState(Checkpoint(tmp_path, 1, {}, layout))

    def cut(rows: int, tp: int) -> Tensor:
        """The second rank's elements from the second on."""
        parameter = torch.nn.Parameter(torch.empty(rows, 2))
        mark_parallel(parameter, ShardSpec(0))
        group: Any = None
        parallel = ParallelState(tp, 1, 1, 0, group, group, torch.device("cpu"))
        assert saved.shard("a", parameter, parallel) is None
        fragment = Fragment(parameter, 1, parameter.numel(), 0)
        return saved.cut_anew("weight", "a", fragment, parallel)

    assert torch.equal(cut(2, 3), whole[2:4].flatten()[1:])
    with pytest.raises(UserError, match="'a' of tp 2 cannot be cut for tp 4; .*launch.tp=2"):
        cut(1, 4)
    group: Any = None
    parallel = ParallelState(2, 1, 1, 0, group, group, torch.device("cpu"))
    parameter = torch.nn.Parameter(torch.empty(3, 2))
    assert saved.shard("a", parameter, parallel) == "a/tp-1-of-2"
    with pytest.raises(UserError, match="has no parameter 'b'"):
        saved.shard("b", parameter, parallel)


def test_rows_at_the_end_of_a_table_are_cut_as_the_table_is() -> None:
    """Of a table of 24 rows the last 5, of which under tp 2 the first rank has none."""
    spec = RowRangeSpec(start=18, stop=23, table_rows=24)
    rows = torch.arange(1.0, 11.0).view(5, 2)
    sizes = {1: [5], 2: [1, 5], 4: [1, 1, 1, 5], 8: [1, 1, 1, 1, 1, 1, 3, 2]}
    for tp, expected in sizes.items():
        shards = [spec.slice(rows, rank, tp) for rank in range(tp)]
        assert [len(shard) for shard in shards] == expected
        assert torch.equal(spec.join(shards), rows)
    assert not spec.slice(rows, 0, 2).any()
