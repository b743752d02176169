"""The triton backend without a GPU.

It runs under Triton's interpreter, and is compiled for each architecture in exactly the
configurations that are launched.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler.compiler")
variants = pytest.importorskip("ilrec_kernels.triton.compile_matrix").variants
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Bytes of shared memory that a block may have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


INTERPRETED = "test_what_runs_under_the_interpreter_passed"


@pytest.fixture(scope="module", autouse=True)
def interpreter(request):
    """The interpreter's tests, which run beside this file's others.

    They are in a process of their own: Triton decides at import whether it interprets.
    """
    if not any(item.name == INTERPRETED for item in request.session.items):
        yield None
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command.append(str(ROOT / "tests/support/interpreted.py"))
    with tempfile.TemporaryFile("w+") as output:
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)
        try:
            yield process, output
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def test_refused_without_a_device():
    from tests.support.loss_cases import make_case, run_case

    with pytest.raises(ValueError, match="triton needs a CUDA device"):
        run_case(make_case(), "triton")
    with pytest.raises(ValueError, match="fp32"):
        run_case(make_case(dtype=torch.float64), "triton")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack (spills live there) and static shared memory of a kernel.

    They are read by the cuobjdump that Triton brings.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def compiled(variant: Any, capability: int) -> Any:
    source = compiler.ASTSource(
        variant.kernel,
        signature=variant.signature,
        constexprs=variant.constants,
        attrs=variant.attributes,
    )
    return triton.compile(
        source, target=compiler.GPUTarget("cuda", capability, 32), options=variant.options
    )


def for_sm_80(ptx: str) -> str:
    """The PTX that Triton makes for compute capability 8.0, from that for 9.0."""
    return ptx.replace(".target sm_90a", ".target sm_80")


def assembled_for_sm_80(variant: Any, ptx: str) -> bytes:
    backend = compiler.make_backend(compiler.GPUTarget("cuda", 80, 32))
    return backend.make_cubin(ptx, {}, backend.parse_options(dict(variant.options)), 80)


@pytest.mark.parametrize("capability", [90, 100])
def test_every_launched_configuration_compiles_without_spills(capability):
    """What is compiled for 9.0 is assembled for 8.0 too."""

    def check(variant: Any, capability: int, cubin: bytes, shared: int) -> None:
        used = resources(cubin)
        assert used["STACK"] == 0 and used["LOCAL"] == 0, (variant.name, used)
        assert used["REG"] <= 255, (variant.name, used)
        assert shared <= SHARED_MEMORY[capability], (variant.name, shared)

    found = list(variants())
    assert len(found) > 10
    for variant in found:
        kernel = compiled(variant, capability)
        check(variant, capability, kernel.asm["cubin"], kernel.metadata.shared)
        if capability == 90:
            cubin = assembled_for_sm_80(variant, for_sm_80(kernel.asm["ptx"]))
            check(variant, 80, cubin, kernel.metadata.shared)


def test_triton_makes_the_same_ptx_for_8_0_as_for_9_0():
    """Of the kernel of each kind with the most terms, and so of the others."""
    most: dict[str, Any] = {}
    for variant in variants():
        name, terms = variant.kernel.__name__, sum(map(bool, variant.constants.values()))
        if name not in most or terms > sum(map(bool, most[name].constants.values())):
            most[name] = variant
    assert len(most) == 2
    for variant in most.values():
        old, new = (compiled(variant, capability) for capability in (80, 90))
        assert old.asm["ptx"] == for_sm_80(new.asm["ptx"]) != new.asm["ptx"]
        assert old.metadata.shared == new.metadata.shared


def test_compiled_forms_are_those_that_a_launch_chooses():
    """Triton specialises a launch by what is a multiple of 16 and what is 1.

    The two forms of each kernel are its extremes.
    """
    forms: dict[str, list[bool]] = {}
    for variant in variants():
        forms.setdefault(variant.kernel.__name__, []).append(bool(variant.attributes))
        if variant.attributes:
            known = {variant.kernel.arg_names[place] for (place,) in variant.attributes} | set(
                variant.constants
            )
            assert set(variant.kernel.arg_names) - known <= {
                "low",
                "high",
                "first",
                "last",
                "m",
                "k",
                "share",
            }, variant.name
    assert all(sum(found) >= len(found) / 2 for found in forms.values()) and len(forms) == 2


@pytest.mark.parametrize("scope", ["valid_next", "all"])
@pytest.mark.parametrize(
    "workspace,source,stacked",
    [(None, "triton", 1536), (1 << 29, "triton", 768), (3 << 27, "slices", 8192)],
)
def test_the_plan_for_a_large_vocabulary_on_a_gpu(workspace, source, stacked, scope):
    """8,192 rows of 4,096 in bf16, 131,072 tokens and 3 layers.

    At the default 1 GiB and at half of it regime T's chunks are large enough; at
    384 MiB regime V's are a third of all rows. Fake tensors stand for the GPU's.
    """
    from ilrec_kernels import LossOptions, TokenLists
    from ilrec_kernels.plan import make_plan
    from ilrec_kernels.problem import Problem
    from torch._subclasses.fake_tensor import FakeTensorMode

    n, d, v = 8192, 4096, 131_072
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = tuple(torch.empty(n, d, dtype=torch.bfloat16, device="cuda") for _ in range(4))
        head = torch.empty(v, d, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        indptr, tokens, targets = (
            torch.empty(size, dtype=torch.int64, device="cuda") for size in (n + 1, 256 * n, n)
        )
        rewards = torch.empty(256 * n, device="cuda")
        options = LossOptions(
            v,
            distill_scope="all",
            negative_scope=scope,
            backend="triton",
            workspace_bytes=workspace,
        )
        lists = TokenLists(indptr, tokens)
        plan = make_plan(Problem(hidden, head, targets, lists, rewards, options, 0, v))
    assert plan.source.value == source and plan.chunk_rows * plan.streams >= stacked
    assert plan.slice_columns >= 512 or source == "triton"


def test_no_kernel_uses_atomics():
    sources = [
        path.read_text(encoding="utf-8") for path in (ROOT / "kernels/ilrec_kernels").rglob("*.py")
    ]
    assert sum("@triton.jit" in source for source in sources) == 1
    assert not any("tl.atomic" in source for source in sources)


def test_what_runs_under_the_interpreter_passed(interpreter):
    """This test comes last, because the others run meanwhile."""
    process, output = interpreter
    code = process.wait()
    output.seek(0)
    assert code == 0, output.read()[-4000:]
