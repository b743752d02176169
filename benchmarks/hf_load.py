"""How much memory does a rank take that loads and saves a whole model?

    python benchmarks/hf_load.py [--quick] [--json FILE] [--tp 4]

Writes a random checkpoint of the Llama family (1 billion parameters in bf16, untied),
and loads it in fp32 with --tp processes. These save it as a training saves its weights,
by shard, load these, and save it as a Hugging Face checkpoint. Every rank's peaks are
compared with its shard; they may exceed it by 1 GiB, but for the last. A process's peak
is the kernel's VmHWM, which counts mapped pages of the files too; libraries are what a
rank has before it builds the backbone.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import (
    command_line,
    describe_machine,
    machine_line,
    peak_mib,
    reset_peak,
    write_figures,
)
from safetensors.torch import save_file

from ilrec_dist.common.run_layout import WEIGHTS_SHA256
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import load_weights, save_weights
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.model.weights import load_training_weights, save_training_weights
from ilrec_dist.testing.distributed import Mesh, run_distributed

GIB = 1 << 30
SHARD_BYTES = 512 << 20
BILLION = dict(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=20,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
)
QUICK = BILLION | dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=4)


# What a rank may take beside its shard in all of the parts but the last.
MARGIN = GIB
PARTS = ("load", "save weights", "load weights", "save")


def main() -> int:
    parser = command_line(__doc__, "a model of 50 million parameters")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint (temporary)")
    arguments = parser.parse_args()
    machine = describe_machine()
    print(machine_line(machine), flush=True)
    folder = Path(tempfile.mkdtemp(prefix="hf-load-", dir=arguments.folder))
    try:
        parameters = write_random_checkpoint(folder / "in", QUICK if arguments.quick else BILLION)
        ranks = run_distributed(
            load_and_save, arguments.tp, arguments.tp, str(folder), timeout=3600
        )
    finally:
        shutil.rmtree(folder)
    print(f"{parameters / 1e9:.2f} billion parameters, tp {arguments.tp}")
    print(f"above a rank's shard in GiB, and seconds: {', '.join(PARTS)}")
    worst = 0
    for rank, row in enumerate(ranks):
        above = {part: row["peaks"][part] - row["shard"] for part in PARTS}
        worst = max(worst, *(above[part] for part in PARTS[:-1]))
        shown = "  ".join(f"{above[p] / GIB:5.2f} {row['seconds'][p]:6.1f}" for p in PARTS)
        held = f"libraries {row['libraries'] / GIB:.2f}, shard {row['shard'] / GIB:.2f} GiB"
        print(f"rank {rank}: {held}: {shown}")
    figures = {"machine": machine, "parameters": parameters, "ranks": ranks}
    write_figures(arguments.json, figures)
    return int(worst > MARGIN)


def write_random_checkpoint(folder: Path, sizes: dict[str, int]) -> int:
    """Write a sharded bf16 checkpoint, layer by layer; returns the number of
    parameters.
    """
    folder.mkdir(parents=True)
    d, ffn, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    kv = d // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (ffn, d), "mlp.up_proj": (ffn, d),
        "mlp.down_proj": (d, ffn), "input_layernorm": (d,), "post_attention_layernorm": (d,),
    }  # fmt: skip
    groups = [
        {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        for number in range(sizes["num_hidden_layers"])
    ]
    groups.append({"model.embed_tokens.weight": (vocab, d)})
    groups.append({"lm_head.weight": (vocab, d), "model.norm.weight": (d,)})
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups):
        tensors = {key: (torch.randn(shape) * 0.02).bfloat16() for key, shape in group.items()}
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = dict(
        model_type="llama",
        rms_norm_eps=1e-5,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        **sizes,
    )
    (folder / "config.json").write_text(json.dumps(config))
    return sum(torch.Size(shape).numel() for group in groups for shape in group.values())


def load_and_save(mesh: Mesh, folder: str) -> dict[str, Any]:
    """One rank: bytes of the libraries, of the shard and at the peaks, and seconds."""
    initialize_parallel(mesh.tp, "cpu")
    peaks, seconds = {}, {}

    def measured(part: str, work: Callable[[], Any]) -> Any:
        reset_peak()
        began = time.perf_counter()
        result = work()
        seconds[part], peaks[part] = time.perf_counter() - began, int(2**20 * peak_mib())
        dist.barrier()
        return result

    try:
        libraries = int(2**20 * peak_mib())
        pretrained = read_config(f"{folder}/in")
        backbone = Backbone(
            pretrained.config, pretrained.vocab_size, pretrained.max_positions, initialize=False
        )
        out, best = f"{folder}/out", Path(folder, "best")
        measured("load", lambda: load_weights(backbone, f"{folder}/in"))
        sha256 = measured("save weights", lambda: save_training_weights(backbone, best))
        if mesh.rank == 0:
            result = {WEIGHTS_SHA256: {best.name: sha256}}
            best.with_name("result.json").write_text(json.dumps(result))
        dist.barrier()
        before = [parameter.clone() for parameter in backbone.parameters() if parameter.dim() == 1]
        measured("load weights", lambda: load_training_weights(backbone, best))
        after = [parameter for parameter in backbone.parameters() if parameter.dim() == 1]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        measured("save", lambda: save_weights(backbone, out, shard_bytes=SHARD_BYTES))
        return {
            "libraries": libraries,
            "shard": sum(p.nbytes for p in backbone.parameters()),
            "peaks": peaks,
            "seconds": seconds,
        }
    finally:
        destroy_parallel()


if __name__ == "__main__":
    sys.exit(main())
