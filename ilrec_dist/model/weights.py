"""The weights of a training: a folder of safetensors files, their index and a manifest.

Each rank writes its own part, and reads its own slices of what ranks
of any tensor parallelism wrote; none holds another's. The manifest has
the SHA-256 of each file, and the result.json beside the folder its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from ilrec_dist.common.disk import writing_to
from ilrec_dist.common.errors import NotWritable, UserError
from ilrec_dist.common.files import committed_folder, read_json_object, sha256_file, write_json
from ilrec_dist.common.manifest import MANIFEST, check_hashes, verify, write_manifest
from ilrec_dist.common.run_layout import BASE_SHA256, RESULT, WEIGHTS_SHA256
from ilrec_dist.distributed.layout import from_rank0, is_rank0
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.tensor_files import INDEX_FILE, TensorReader, read_slice
from ilrec_dist.model.partial import load_partial, partial_reader, partial_state_dict
from ilrec_dist.model.sharding import full_shape, shard_spec
from ilrec_dist.model.weight_layout import (
    PlannedFile,
    StoredTensor,
    StoredWeights,
    index_of,
    plan_files,
    slices,
)


def save_training_weights(backbone: Backbone, folder: Path) -> str:
    """Write what was trained; a collective over all ranks.

    That is all weights, of which each rank writes its part, or what `train_partially`
    attached and the rows of added tokens, which rank 0 writes; in the precision that
    the model computes in. The folder appears whole or not at all, in the place of an
    earlier one. Returns the SHA-256 of its manifest on rank 0, and "" elsewhere. Where
    a rank cannot write, all raise its NotWritable.
    """
    is_partial, tp, dp = backbone.base_sha256 is not None, backbone.tp_group.size(), 1
    if is_partial:
        # Empty but on rank 0.
        state: Mapping[str, Tensor] = partial_state_dict(backbone)
        tensors, tp = _whole_tensors(state), 1
    else:
        backbone.write_trained_rows()
        state, tensors = dict(backbone.gpt.named_parameters()), _cut_tensors(backbone)
        dp = parallel_state.get_data_parallel_world_size()
    files = plan_files(tensors, tp, dp)
    me = backbone.tp_group.rank(), parallel_state.get_data_parallel_rank()
    sha256 = ""
    with ExitStack() as stack:
        own_folder = stack.enter_context(committed_folder(folder)) if is_rank0() else None
        staged: Path = from_rank0(own_folder)
        of_ranks: list[Any] = [None] * dist.get_world_size()
        files_here = [file for file in files if (file.tp_rank, file.dp_rank) == me]
        dist.all_gather_object(of_ranks, _write_files(staged, files_here, state))
        for outcome in of_ranks:
            if isinstance(outcome, NotWritable):
                raise outcome
        if is_rank0():
            write_json(staged / INDEX_FILE, index_of(tensors, tp, files))
            known = {name: digest for part in of_ranks for name, digest in part.items()}
            known[INDEX_FILE] = sha256_file(staged / INDEX_FILE)
            write_manifest(staged, {}, hashes=dict(sorted(known.items())))
            sha256 = sha256_file(staged / MANIFEST)
    dist.barrier()
    return sha256


@torch.no_grad()
def load_training_weights(backbone: Backbone, folder: Path) -> Backbone:
    """Load a finished training's folder of weights, written under any tp; the backbone
    in eval mode.

    A rank reads its own slices, after it has compared the files that hold them with the
    manifest. Raises UserError naming a file that is missing or not the one whose
    SHA-256 is known, a tensor that is missing, left over, of another shape or not
    finite, and where a partial training began with other weights than the backbone's.
    """
    if backbone.base_sha256 is None:
        _load_slices(backbone, folder)
    else:
        verified_partial(backbone, folder)
        load_partial(backbone, folder)
    return backbone.eval()


def verified_partial(backbone: Backbone, folder: Path) -> TensorReader:
    """Open the weights of a training that left most of a model's as they are, compared
    with the manifest.

    UserError as in `load_training_weights`.
    """
    repair = _repair(folder)
    base = _check_manifest(folder, repair)["model"][BASE_SHA256]
    if base != backbone.base_sha256:
        raise UserError(
            f"{folder}: trained on a model whose weights have the SHA-256 {base}, and "
            f"those in backbone.from have {backbone.base_sha256}; restore that model"
        )
    verify(folder, repair=repair)
    reader = partial_reader(backbone, folder)
    for name, entry in reader.entries.items():
        require_finite(name, reader.read(name, 0, 0, entry.shape[0]), folder)
    return reader


def verified_weights(backbone: Backbone, folder: Path) -> StoredWeights:
    """Describe the weights of a training of all of them, compared with the manifest and
    with the backbone, whose values are not used.

    UserError as in `load_training_weights`.
    """
    repair = _repair(folder)
    stored = _open_stored(backbone, folder)
    verify(folder, sorted(set(stored.files.values())), repair)
    return stored


def manifest_is(folder: Path, sha256: str) -> bool:
    """Whether the folder of weights is the one whose manifest has this hash."""
    manifest = folder / MANIFEST
    return manifest.is_file() and sha256_file(manifest) == sha256


def _check_manifest(folder: Path, repair: str) -> dict[str, Any]:
    """The result.json beside a folder of weights, after the manifest was compared with
    it.
    """
    result = read_json_object(folder.with_name(RESULT), repair)
    expected = result.get(WEIGHTS_SHA256, {}).get(folder.name)
    check_hashes(folder.parent, {f"{folder.name}/{MANIFEST}": expected}, RESULT, repair)
    return result


def _repair(folder: Path) -> str:
    """What to do about a damaged file of the folder."""
    return f"restore it, or delete {folder.parent} and run `ilrec run` again"


def _open_stored(backbone: Backbone, folder: Path) -> StoredWeights:
    """The index, compared with the manifest and the backbone."""
    repair = _repair(folder)
    _check_manifest(folder, repair)
    verify(folder, [INDEX_FILE], repair)
    stored = StoredWeights.open(folder)
    _check_tensors(folder, stored, _cut_tensors(backbone))
    return stored


def _load_slices(backbone: Backbone, folder: Path) -> None:
    """Fill all of this rank's weights."""
    stored, tensors = _open_stored(backbone, folder), _cut_tensors(backbone)
    tp, rank = backbone.tp_group.size(), backbone.tp_group.rank()
    parameters = dict(backbone.gpt.named_parameters())
    wanted = [
        (name, *stored.piece(name, part.piece), part)
        for name, piece in stored.tensors.items()
        for part in slices(piece.shape, tensors[name].spec, piece.pieces(stored.tp), rank, tp)
    ]
    verify(folder, sorted({file for _, _, file, _ in wanted}), _repair(folder))
    for name, key, file, part in wanted:
        values = read_slice(folder / file, key, part.dim, part.start, part.stop)
        require_finite(name, values, folder)
        parameters[name].narrow(part.dim, part.target, part.stop - part.start).copy_(values)
    if backbone.trained_rows is not None:
        backbone.trained_rows.read_from(backbone.vocabulary_tables)


def require_finite(name: str, tensor: Tensor, folder: Path) -> None:
    """Raise UserError where a tensor of a training's weights has NaN or infinity."""
    # NaN is the smallest and the largest number of whatever holds one.
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise UserError(
            f"{folder}: tensor {name!r} holds numbers that are not finite (NaN or infinite), so "
            "its training has diverged; lower train.learning_rate or lengthen train.warmup, "
            "and train again"
        )


def _check_tensors(
    folder: Path, stored: StoredWeights, expected: Mapping[str, StoredTensor]
) -> None:
    """Raise UserError unless the folder has the expected tensors, and no others."""
    for name in sorted(expected.keys() ^ stored.tensors.keys()):
        problem = "missing" if name in expected else "not part of this backbone"
        raise UserError(f"{folder}: tensor {name!r} is {problem}; is it of another configuration?")
    for name, wanted in expected.items():
        actual = stored.tensors[name]
        if (actual.shape, actual.spec) != (wanted.shape, wanted.spec):
            raise UserError(
                f"{folder}: tensor {name!r} has shape {actual.shape}, expected {wanted.shape}; is "
                "it of another configuration?"
            )


def _cut_tensors(backbone: Backbone) -> dict[str, StoredTensor]:
    """The backbone's tensors, with how they are cut over ranks."""
    config, tp = backbone.config, backbone.tp_group.size()
    cut = {}
    for name, parameter in backbone.gpt.named_parameters():
        spec = shard_spec(name, config)
        shape = full_shape(parameter.shape, spec, tp)
        cut[name] = StoredTensor(shape, spec, parameter.element_size())
    return cut


def _whole_tensors(state: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(list(tensor.shape), None, tensor.element_size())
        for name, tensor in state.items()
    }


def _write_files(
    staged: Path, files: Sequence[PlannedFile], state: Mapping[str, Tensor]
) -> dict[str, str] | NotWritable:
    """Write this rank's files; their SHA-256, or why they cannot be written."""
    try:
        with writing_to(staged):
            for file in files:
                _write(staged / file.name, file.pieces, state)
            return {file.name: sha256_file(staged / file.name) for file in files}
    except NotWritable as error:
        return error


def _write(path: Path, pieces: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """Write the named pieces of this rank's
    tensors; the host's copies of them go at the end.
    """
    parts = {key: state[name].detach().cpu().contiguous() for name, key in pieces.items()}
    save_file(parts, path, metadata={"format": "pt"})
