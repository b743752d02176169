"""The wheel holds both packages with their data, the licence and the command, and
nothing else.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_a_wheel_holds_both_packages_and_the_command(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ilrec_dist", "kernels"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    packages = (source / "ilrec_dist", source / "kernels/ilrec_kernels")
    modules = {
        str(path.relative_to(package.parent))
        for package in packages
        for pattern in ("*.py", "*.yaml")
        for path in package.rglob(pattern)
    }
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
            str(source),
        ],
        check=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("ilrec_dist-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (
            archive.read(name).decode() for name in names if name.endswith("entry_points.txt")
        )
    assert "ilrec_dist/cli/main.py" in modules and "ilrec_kernels/api.py" in modules
    assert {name for name in names if ".dist-info/" not in name} == modules
    assert any(name.endswith("LICENSE") for name in names)
    assert "ilrec = ilrec_dist.cli.main:main" in entry_points
