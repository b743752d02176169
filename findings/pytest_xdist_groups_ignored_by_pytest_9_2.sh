#!/usr/bin/env bash
# pytest-xdist 3.8.0 with pytest 9.2.0: the marker xdist_group has no effect, so tests of one group run in several
# processes.
#
# Behaviour: with --dist loadgroup, xdist appends "@group" to the private attribute _nodeid of each item, and its
# scheduler reads the group from the end of the node id. pytest 9.2 keeps the node id elsewhere, so the suffix never
# arrives. With pytest 9.0 the same tests stay together.
# Output seen: "pytest 9.0.2: processes per group [1, 1, 1, 1]", "pytest 9.2.0: processes per group [2, 2, 2, 2]". No
# warning, and all tests pass.
# Why it matters: what a group guards (one server, one database, fixtures of a module that cost minutes) is started
# once in each process, and tests that must not run side by side do. A scheduler of one's own
# (pytest_xdist_make_scheduler) or --dist loadfile still keep tests together.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/test_groups.py" <<'PY'
import os
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(
    "group", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in "abcd"]
)
def test_group(group, number):
    time.sleep(0.05)
    with open(Path(os.environ["SEEN"]), "a") as file:
        file.write(f"{group} {os.environ['PYTEST_XDIST_WORKER']}\n")
PY
cat > "$folder/count.py" <<'PY'
import collections
import sys

processes = collections.defaultdict(set)
for line in open(sys.argv[2]):
    group, process = line.split()
    processes[group].add(process)
counts = [len(processes[group]) for group in sorted(processes)]
print(f"pytest {sys.argv[1]}: processes per group {counts}")
assert len(counts) == 4
together = sys.argv[1] == "9.0.2"
assert (max(counts) == 1) if together else (max(counts) > 1), "this has changed"
PY
for version in 9.0.2 9.2.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "pytest==$version" pytest-xdist==3.8.0
    (cd "$folder" && SEEN="$folder/$version.txt" "$folder/$version/bin/python" -m pytest -q -n 2 --dist loadgroup test_groups.py)
    "$folder/$version/bin/python" "$folder/count.py" "$version" "$folder/$version.txt"
done
