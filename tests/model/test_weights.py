"""A training's weights: written by every rank, read by slices under any tp."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ilrec_dist.common.errors import NotWritable, UserError
from ilrec_dist.common.files import sha256_file
from ilrec_dist.common.manifest import write_manifest
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model import weight_layout
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.families import DECODER
from ilrec_dist.model.hf.tensor_files import TensorReader
from ilrec_dist.model.sharding import ShardSpec
from ilrec_dist.model.weight_layout import StoredTensor, piece_name, plan_files, slices
from ilrec_dist.model.weights import load_training_weights, save_training_weights
from ilrec_dist.testing.distributed import Mesh, run_distributed
from ilrec_dist.testing.whole_weights import whole_weights
from tests.support.whole_model import full_state_dict

LLAMA = BackboneConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=1,
    ffn_hidden_size=64,
    init_std=0.2,
    **DECODER,
    tie_embeddings=False,
)
# With biases, which are cut along their one dimension or whole, learned positions, tied.
GPT2 = BackboneConfig(num_layers=2, hidden_size=32, num_heads=4, ffn_hidden_size=64, init_std=0.2)
CONFIGS = {"gpt2": GPT2, "llama": LLAMA}
VOCAB, POSITIONS = 1001, 16
LAYOUTS = [(1, 1), (2, 2), (2, 1), (4, 2), (4, 4)]


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation gives.

    A file's tensor that is mapped does not count, and neither do views of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.mapped = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            place = result.untyped_storage().data_ptr()
            if func is torch.ops.aten.set_.source_Storage:
                self.mapped.add(place)
            if place not in self.mapped:
                self.bytes = max(self.bytes, result.nbytes)
        return result


def build(config: BackboneConfig, precision: str = "fp32", seed: int = 0) -> Backbone:
    return Backbone(config, VOCAB, POSITIONS, precision=precision, seed=seed)


def write(
    mesh: Mesh, config: BackboneConfig, folder: str, precision: str, spoilt: float | None = None
) -> dict[str, Any]:
    """Save a backbone with weights of its own, and the result.json beside it.

    spoilt: one number of the second tensor-parallel rank's, in place of what it was.
    """
    initialize_parallel(mesh.tp, "cpu")
    try:
        model = build(config, precision, seed=5)
        if spoilt is not None and mesh.tp_rank == 1:
            model.gpt.decoder.layers[1].mlp.linear_fc2.weight.data[3, 4] = spoilt
        with LargestTensor() as largest:
            sha256 = save_training_weights(model, Path(folder))
        if mesh.rank == 0:
            result = {"weights_sha256": {Path(folder).name: sha256}}
            Path(folder).with_name("result.json").write_text(json.dumps(result))
        own = max(parameter.nbytes for parameter in model.parameters())
        return {"state": full_state_dict(model), "largest": largest.bytes, "own": own}
    finally:
        destroy_parallel()


def read(mesh: Mesh, config: BackboneConfig, folder: str, precision: str) -> Any:
    """The whole state after loading and the largest
    tensor on the way, or the line of a refusal.
    """
    initialize_parallel(mesh.tp, "cpu")
    try:
        model = build(config, precision)
        own = max(parameter.nbytes for parameter in model.parameters())
        try:
            with LargestTensor() as largest:
                load_training_weights(model, Path(folder))
        except UserError as error:
            return str(error)
        assert not model.training
        return {"state": full_state_dict(model), "largest": largest.bytes, "own": own}
    finally:
        destroy_parallel()


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def in_fp32(folder: Path) -> None:
    """Make the files as versions before wrote those of a bf16 training too."""
    for file in folder.glob("*.safetensors"):
        save_file({name: one.float() for name, one in load_file(file).items()}, file)
    write_manifest(folder, {})
    hashes = {"weights_sha256": {folder.name: sha256_file(folder / "manifest.json")}}
    folder.with_name("result.json").write_text(json.dumps(hashes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """A folder of LLAMA's weights written under each layout."""
    root, folders, states = tmp_path_factory.mktemp("weights"), {}, []
    for world, tp in LAYOUTS:
        folder = root / f"{world}-{tp}" / "best"
        folder.parent.mkdir()
        ranks = run_distributed(write, world, tp, LLAMA, str(folder), "fp32")
        # No rank has held a cut tensor whole, and the embedding is the largest by far.
        assert all(rank["largest"] <= rank["own"] for rank in ranks)
        states += [rank["state"] for rank in ranks]
        folders[world, tp] = folder
    assert all(equal(state, states[0]) for state in states)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 2), (4, 4)])
def test_what_any_tp_wrote_is_read_by_slices_under_any_other(saved, world, tp) -> None:
    expected = whole_weights(saved[1, 1])
    for folder in saved.values():
        assert equal(whole_weights(folder), expected)
        for rank in run_distributed(read, world, tp, LLAMA, str(folder), "fp32"):
            assert equal(rank["state"], expected)
            assert rank["largest"] <= rank["own"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_biases_and_whole_tensors_and_bf16_keep_their_bits(tmp_path: Path, precision: str) -> None:
    (start,) = run_distributed(write, 1, 1, GPT2, str(tmp_path / "best"), precision)
    stored = whole_weights(tmp_path / "best")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    assert all(one.dtype == dtype for one in stored.values())
    assert equal({name: one.float() for name, one in stored.items()}, start["state"])
    for two in run_distributed(read, 2, 2, GPT2, str(tmp_path / "best"), precision):
        assert equal(two["state"], start["state"])
    run_distributed(write, 2, 2, GPT2, str(tmp_path / "best"), precision)
    (back,) = run_distributed(read, 1, 1, GPT2, str(tmp_path / "best"), precision)
    assert equal(back["state"], start["state"])
    in_fp32(tmp_path / "best")
    (back,) = run_distributed(read, 1, 1, GPT2, str(tmp_path / "best"), precision)
    assert equal(back["state"], start["state"])


@pytest.mark.slow
def test_every_rank_writes_and_the_index_is_that_of_hugging_face(saved) -> None:
    for (world, _), folder in saved.items():
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) >= world
        assert files == [
            f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
        ]
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            [*files, "model.safetensors.index.json", "manifest.json"]
        )
        # Each tensor of the index is in its file.
        entries = TensorReader(folder).entries
        assert entries.keys() == index["weight_map"].keys()
        sizes = [torch.Size(entry.shape).numel() * 4 for entry in entries.values()]
        assert sum(sizes) == index["metadata"]["total_size"]


@pytest.mark.slow
def test_a_new_folder_takes_the_old_ones_place(saved, tmp_path: Path) -> None:
    """Files of the earlier layout do not stay."""
    shutil.copytree(saved[4, 4].parent, tmp_path / "again")
    run_distributed(write, 1, 1, LLAMA, str(tmp_path / "again/best"), "fp32")
    names = sorted(path.name for path in (tmp_path / "again/best").iterdir())
    assert names == sorted(path.name for path in saved[1, 1].iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["best", "result.json"]


@pytest.mark.slow
def test_what_is_damaged_or_of_another_model_is_named(saved, tmp_path: Path) -> None:
    folder = tmp_path / "copy/best"
    shutil.copytree(saved[2, 2].parent, folder.parent)

    def refused(*words: str, config: BackboneConfig = LLAMA) -> None:
        (line,) = run_distributed(read, 1, 1, config, str(folder), "fp32")
        assert all(word in line for word in words) and "\n" not in line, line

    refused("decoder.layers.2", "missing", config=replace(LLAMA, num_layers=3))
    refused("decoder.layers.1", "not part", config=replace(LLAMA, num_layers=1))
    refused("expected [1008, 64]", str(folder), config=replace(LLAMA, hidden_size=64))
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 1
        for content in (bytes(damaged), whole[: len(whole) // 2]):
            path.write_bytes(content)
            refused(str(path), "damaged", "SHA-256")
        path.unlink()
        refused(f"{path}: missing")
        path.write_bytes(whole)


def write_where_there_is_no_room(mesh: Mesh, folder: str) -> str:
    with pytest.raises(NotWritable) as caught:
        write(mesh, LLAMA, folder, "fp32")
    return str(caught.value)


@pytest.mark.slow
def test_a_rank_that_cannot_write_is_a_line_on_every_rank(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=240k", "none", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        # There is room for one part of the two.
        lines = run_distributed(write_where_there_is_no_room, 2, 2, str(tmp_path / "best"))
        assert len(set(lines)) == 1 and "No space left on device; make room" in lines[0]
        assert lines[0].startswith(str(tmp_path)) and not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_although_their_hash_fits(value, tmp_path) -> None:
    folder = str(tmp_path / "best")
    run_distributed(write, 2, 2, LLAMA, folder, "fp32", value)
    (line,) = run_distributed(read, 1, 1, LLAMA, folder, "fp32")
    assert "best: tensor 'decoder.layers.1.mlp.linear_fc2.weight' holds numbers" in line


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
@pytest.mark.parametrize("spec", [ShardSpec(0), ShardSpec(1), ShardSpec(0, parts=2), None], ids=str)
def test_slices_are_those_of_the_whole_tensor(spec, pieces, tp) -> None:
    whole = torch.arange(16 * 24).view(16, 24)
    if spec is None:
        pieces = 1
    stored = [whole if spec is None else spec.slice(whole, n, pieces) for n in range(pieces)]
    for rank in range(tp):
        expected = whole if spec is None else spec.slice(whole, rank, tp)
        found = torch.full_like(expected, -1)
        for part in slices(list(whole.shape), spec, pieces, rank, tp):
            size = part.stop - part.start
            values = stored[part.piece].narrow(part.dim, part.start, size)
            found.narrow(part.dim, part.target, size).copy_(values)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 3), (2, 2), (4, 1)])
def test_files_are_of_limited_size_and_shared_out(tp, dp, monkeypatch) -> None:
    monkeypatch.setattr(weight_layout, "FILE_BYTES", 5_000)
    tensors = {f"cut {n}": StoredTensor([40, 10 + n], ShardSpec(0)) for n in range(9)}
    tensors |= {f"whole {n}": StoredTensor([30 + n]) for n in range(3)}
    tensors["large"] = StoredTensor([80, 40], ShardSpec(0))
    files = plan_files(tensors, tp, dp)
    written = [key for file in files for key in file.pieces.values()]
    assert sorted(written) == sorted(
        piece_name(name, rank, one.pieces(tp))
        for name, one in tensors.items()
        for rank in range(one.pieces(tp))
    )
    for file in files:
        total = sum(tensors[name].piece_bytes(tp) for name in file.pieces)
        assert total <= 5_000 or len(file.pieces) == 1
        assert all(tensors[name].spec is not None or file.tp_rank == 0 for name in file.pieces)
    assert {(file.tp_rank, file.dp_rank) for file in files} == {
        (t, d) for t in range(tp) for d in range(dp)
    }
