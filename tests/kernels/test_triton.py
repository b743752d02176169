"""The triton backend without a GPU: under the interpreter, and compiled for each architecture in exactly the configurations that are launched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have


def test_under_the_interpreter():
    """In a process of its own: Triton decides at import whether it interprets."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/kernels/interpreted.py")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def test_refused_without_a_device():
    from tests.kernels.cases import make_case, run_case

    with pytest.raises(ValueError, match="triton needs a CUDA device"):
        run_case(make_case(), "triton")
    with pytest.raises(ValueError, match="fp32"):
        run_case(make_case(dtype=torch.float64), "triton")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack (spills live there) and static shared memory, read by the cuobjdump that Triton brings."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_launched_configuration_compiles_without_spills(capability):
    from ilrec_kernels.compiled import variants
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    checked = 0
    for variant in variants():
        source = ASTSource(variant.kernel, signature=variant.signature, constexprs=variant.constants, attrs=variant.attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
        used = resources(kernel.asm["cubin"])
        assert used["STACK"] == 0 and used["LOCAL"] == 0, (variant.name, used)
        assert used["REG"] <= 255, (variant.name, used)
        assert kernel.metadata.shared <= SHARED_MEMORY[capability], (variant.name, kernel.metadata.shared)
        checked += 1
    assert checked > 10
