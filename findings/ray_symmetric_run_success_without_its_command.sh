#!/usr/bin/env bash
# Ray 2.60.0: `ray symmetric-run` ends with 0 on the head node when Ray did not start there and the command never ran.
#
# Behaviour: symmetric-run starts Ray on all nodes of an allocation, runs a command on the head and stops Ray. The
# command's status is its own status: a command that ends with 7 makes it 7. When `ray start` fails it prints "Failed to
# start Ray", skips the command, stops Ray, and has no status to hand on, so that it ends with 0.
# Output seen: with another program at the port (6379, Ray's usual one, is also that of Redis) "Failed to start Ray:
# Command '['ray', 'start', '--head', ...]' returned non-zero exit status 1." after a minute, status 0, and the command
# left no trace. At a free port the same call runs the command, and has status 7.
# Why it matters: this is the one-line way to a training on a SLURM allocation. A job whose training never began is
# COMPLETED, what was queued behind it with afterok (evaluation, export) begins on the results of an earlier run, and
# nothing asks for the job again. Have the command leave a mark, and look for the mark.
# Runs in a process namespace of its own, because symmetric-run stops every Ray that it sees.
set -euo pipefail
unshare --user --map-root-user --pid --fork --mount-proc true || { echo "needs unshare with user namespaces" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
cat > "$folder/starts.py" <<'PY'
import socket
import subprocess
import sys
from pathlib import Path

mark = Path(sys.argv[1])


def run(port):
    mark.unlink(missing_ok=True)
    command = ["bash", "-c", f"touch {mark}; exit 7"]
    options = ["--address", f"127.0.0.1:{port}", "--num-cpus", "1", "--include-dashboard=false"]
    ended = subprocess.run(
        ["ray", "symmetric-run", *options, "--", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    failed = [line for line in ended.stdout.splitlines() if line.startswith("Failed to start Ray")]
    print(f"status {ended.returncode}, command ran: {mark.exists()}", *failed, flush=True)
    return ended.returncode, mark.exists(), bool(failed)


with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    taken = run(port)
free = run(port)
assert free == (7, True, False), "the call itself no longer works"
assert taken == (0, False, True), "a cluster that did not start is told by the status now"
PY
HOME="$folder" RAY_TMPDIR="$folder" RAY_USAGE_STATS_ENABLED=0 PATH="$folder/venv/bin:$PATH" \
    unshare --user --map-root-user --pid --fork --mount-proc --kill-child \
    "$folder/venv/bin/python" "$folder/starts.py" "$folder/mark"
