"""An export holds a block of rows, whatever the
model's size: counted in bytes of live tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ilrec_dist.common.run_layout import BASE_SHA256, RESULT, WEIGHTS_SHA256
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.export import tensor_rows
from ilrec_dist.export.logit_shift import logit_shift
from ilrec_dist.export.tensor_rows import AdapterTensors, MergedTensors, StoredTensors
from ilrec_dist.model.config import BackboneConfig, LoraConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf import tensor_files
from ilrec_dist.model.hf.checkpoint import load_weights, plan_checkpoint, save_weights
from ilrec_dist.model.hf.tensor_files import write_tensors
from ilrec_dist.model.partial import train_partially
from ilrec_dist.model.weights import save_training_weights
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.live_bytes import LiveBytes
from tests.support.whole_adapters import merge_lora, save_adapter

pytestmark = pytest.mark.slow
BLOCK, SHARD = 24 << 10, 1 << 20
BASE_ROWS, VOCAB, ADDED = 650, 700, (640, 700)
LAYERS = 8
SIZES = BackboneConfig(
    num_layers=LAYERS,
    hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=320,
    normalization="RMSNorm",
    activation="swiglu",
    position_embedding="rope",
    bias=False,
    dropout=0.0,
    tie_embeddings=False,
    init_std=0.1,
)
LORA = LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture
def parallel() -> Iterator[None]:
    initialize_parallel(1, "cpu")
    yield
    destroy_parallel()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    """Blocks that are small beside a tensor, and slices of files that are counted."""
    read_slice = tensor_files.read_slice

    def copied(*arguments: Any) -> Tensor:
        # A slice of a mapped file has the storage of its whole tensor.
        with _disable_current_modes():
            part = read_slice(*arguments)
        return part.clone()

    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(tensor_files, "read_slice", copied)
    monkeypatch.setattr(tensor_rows, "read_slice", copied)


def empty() -> Backbone:
    with torch.device("meta"):
        return Backbone(SIZES, VOCAB, 64, initialize=False)


def store(backbone: Backbone, folder: Path) -> Path:
    """Write a training's folder of weights, and the result beside it."""
    folder.parent.mkdir(exist_ok=True)
    sha256 = save_training_weights(backbone, folder)
    if backbone.tp_group.rank() == 0:
        model = {BASE_SHA256: backbone.base_sha256}
        result = {WEIGHTS_SHA256: {folder.name: sha256}, "model": model}
        folder.with_name(RESULT).write_text(json.dumps(result))
    return folder


def store_with_tp(mesh: Mesh, folder: str) -> None:
    initialize_parallel(mesh.tp, "cpu")
    try:
        store(Backbone(SIZES, VOCAB, 64), Path(folder))
    finally:
        destroy_parallel()


def read(folder: Path) -> dict[str, Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def written(tensors: Any, folder: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """What `write_tensors` writes, and the peak of what is alive meanwhile."""
    folder.mkdir()
    with LiveBytes([]) as live:
        write_tensors(tensors, folder, dtype, SHARD)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(sizes) > 1 and max(sizes.values()) < SHARD + (16 << 10)
    assert sizes.keys() == set(index["weight_map"].values())
    return read(folder), live.peak


def model_bytes(tensors: Any) -> int:
    return 4 * sum(torch.Size(shape).numel() for shape in tensors.shapes.values())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_are_written_block_by_block(
    tp: int, dtype: torch.dtype, parallel, tmp_path: Path
) -> None:
    run_distributed(store_with_tp, tp, tp, str(tmp_path / "training" / "best"))
    tensors = StoredTensors(empty(), tmp_path / "training" / "best")
    found, peak = written(tensors, tmp_path / "out", dtype)
    save_weights(Backbone(SIZES, VOCAB, 64), tmp_path / "whole", dtype)
    expected = read(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert 0 < peak <= 8 * BLOCK < model_bytes(tensors) / 20


@pytest.fixture
def adapted(parallel, tmp_path: Path) -> tuple[Backbone, Path, Path]:
    """A backbone with adapters and new rows, its base in bf16, its weights' folder."""
    base = tmp_path / "base"
    save_weights(Backbone(SIZES, BASE_ROWS, 64, seed=1), base, torch.bfloat16)
    backbone = Backbone(SIZES, VOCAB, 64, initialize=False).eval()
    load_weights(backbone, base)
    train_partially(backbone, "lora+new_rows", LORA, base, ADDED, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    return backbone, base, store(backbone, tmp_path / "training" / "best")


def shapes_of(base: Path) -> tuple[Backbone, Any]:
    backbone = empty()
    plan = plan_checkpoint(backbone, base)
    with torch.device("meta"):
        train_partially(backbone, "lora+new_rows", LORA, base, ADDED, 0)
    return backbone, plan


@torch.no_grad()
def logits(backbone: Backbone, histories: list[Tensor]) -> Tensor:
    hidden = torch.cat([backbone.prefill(tokens[None])[0] for tokens in histories])
    return (hidden @ backbone.head_weight.t())[:, :VOCAB]


def test_adapters_are_merged_block_by_block(adapted, tmp_path: Path) -> None:
    backbone, base, folder = adapted
    shapes, plan = shapes_of(base)
    tensors = MergedTensors(shapes, plan, folder)
    found, peak = written(tensors, tmp_path / "out", torch.float32)
    assert 0 < peak <= 8 * BLOCK < model_bytes(tensors) / 20
    rounded, _ = written(tensors, tmp_path / "rounded", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    histories = [torch.randint(0, VOCAB, (n,), generator=generator) for n in (5, 9, 1)]
    with LiveBytes([]) as live:
        shift = logit_shift(tensors, plan, shapes, torch.bfloat16, histories, torch.device("cpu"))
    layer = 4 * sum(p.numel() for p in backbone.gpt.decoder.layers[0].parameters())
    assert layer <= live.peak <= layer + 8 * BLOCK < model_bytes(tensors) / 4

    states = {"adapted": logits(backbone, histories)}
    backbone.lora.detach()
    states["base"] = logits(backbone, histories)
    merge_lora(backbone)
    save_weights(backbone, tmp_path / "whole", torch.float32)
    expected, original = read(tmp_path / "whole"), read(base)
    assert found.keys() == rounded.keys() == expected.keys() == original.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)
        assert torch.equal(rounded[key], found[key].bfloat16())
        if not key.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            rows = ADDED[0] if original[key].shape != tensor.shape else len(tensor)
            assert torch.equal(rounded[key][:rows], original[key][:rows]), key
    backbone.write_trained_rows()
    with torch.no_grad():
        for weight in backbone.gpt.parameters():
            weight.copy_(weight.bfloat16())
    backbone.trained_rows.read_from(backbone.vocabulary_tables)
    norm = states["adapted"].norm()
    distance = {"base": states["base"], "rounded": logits(backbone, histories)}
    for name, value in (("base", shift.by_adapters), ("rounded", shift.by_rounding)):
        exact = float((distance[name] - states["adapted"]).norm() / norm)
        assert value == pytest.approx(exact, rel=1e-3), name


def test_an_adapter_is_written_block_by_block(adapted, tmp_path: Path) -> None:
    backbone, base, folder = adapted
    tensors = AdapterTensors(shapes_of(base)[0], folder)
    (tmp_path / "out").mkdir()
    with LiveBytes([]) as live:
        write_tensors(tensors, tmp_path / "out", torch.bfloat16, single_file="a.safetensors")
    assert 0 < live.peak <= 4 * BLOCK
    save_adapter(backbone, tmp_path / "whole", "base", torch.bfloat16)
    found, expected = load_file(tmp_path / "out" / "a.safetensors"), read(tmp_path / "whole")
    assert found.keys() == expected.keys() and any("trainable_tokens" in key for key in found)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
