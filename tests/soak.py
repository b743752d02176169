"""Random faults over one long small training, which ends as if nothing had happened.

    python tests/soak.py [--faults N] [--seed S] [--folder F] [--log FILE]
                         [--minutes M] [--timeout T]

Two data-parallel workers train on a Ray cluster of three nodes, in network namespaces
where the user may make them, with a reward actor and a checkpoint every ten steps. Each
fault comes at a random moment after the training has got further than it was at the one
before. A promise that is not kept is noted, and cluster and command begin anew. At the
end weights and losses must be, bit for bit, those of the same training under torchrun
without any fault, which runs beside it. Exit code 0 only then, and if all was kept.

Killed or interrupted, the same command goes on with the faults that are left.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "kernels")]

import yaml  # noqa: E402
from harness import describe_machine, machine_line  # noqa: E402

from ilrec_dist.common.config_fields import config_to_dict  # noqa: E402
from ilrec_dist.common.errors import UserError  # noqa: E402
from ilrec_dist.common.files import read_json_object, write_json, write_text  # noqa: E402
from ilrec_dist.common.run_layout import RESULT, WEIGHTS_SHA256  # noqa: E402
from ilrec_dist.config.tree import Config  # noqa: E402
from ilrec_dist.launch.workers import end_with_parent  # noqa: E402
from ilrec_dist.pipeline.artifacts import RunArtifacts  # noqa: E402
from ilrec_dist.pipeline.execute import execute  # noqa: E402
from ilrec_dist.pipeline.prompting import epoch_steps  # noqa: E402
from ilrec_dist.reporting.metrics_log import read_metrics  # noqa: E402
from tests.support.soak_faults import KINDS  # noqa: E402
from tests.support.soaked_training import (  # noqa: E402
    TIMEOUT_SECONDS,
    WORKERS,
    Broken,
    SoakedTraining,
)
from tests.support.tiny_run import tiny_config  # noqa: E402

EXAMPLE = "python tests/soak.py --faults 40 --seed 7 --folder soak --log soak.log"
EPOCH_STEPS, STEPS_PER_FAULT, LAST_STEPS = 50, 40, 100
# Checkpoints come twice in them, as often as a training logs: the first line after a resumption
# covers as many steps then.
CHECKPOINT_STEPS = 20
# How long the training may take to get on where nothing happens to it.
PROGRESS_SECONDS = 240.0
# The file system of the run's folder, which is filled up.
DISK = "64m"
SOAKED, UNDISTURBED = "soaked.yaml", "undisturbed.yaml"
MISSING = "the run's folder needs a file system of its own; run this as root"


@dataclass(frozen=True)
class Fault:
    """What became of one; steps are those that were logged."""

    number: int
    kind: str
    what: str
    # The last step before it, and the one that the training went on from (the same where it
    # did not go back), with the logged steps that were done again.
    step: int
    gone_on_from: int
    repeated: int
    # Until the next step was logged.
    seconds: float
    # The promise that was not kept; "" where all were.
    broken: str = ""

    def line(self) -> str:
        name = f"{self.number:4d}  {self.kind:9s}  {self.what:27s}"
        if self.broken:
            return f"{name}  step {self.step:6d}  NOT KEPT: {self.broken}"
        return (
            f"{name}  step {self.step:6d}  on from {self.gone_on_from:6d}  "
            f"repeated {self.repeated:3d}  {self.seconds:6.1f} s"
        )


def draw(count: int, seed: int) -> list[str]:
    """The kinds in their order: of each its share, and at least one where that fits."""
    total = sum(kind.share for kind in KINDS.values())
    counts = {
        name: max(count >= len(KINDS), count * kind.share // total) for name, kind in KINDS.items()
    }
    names = [name for name, times in counts.items() for _ in range(times)]
    chance = random.Random(seed)
    chance.shuffle(names)
    names = names[:count]
    while len(names) < count:
        names.insert(chance.randrange(len(names) + 1), "worker")
    return names


class Soak:
    def __init__(
        self,
        folder: Path,
        log: Path,
        faults: int,
        seed: int,
        minutes: float | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self.folder, self.log, self.seed, self.timeout = folder, log, seed, timeout
        self.kinds = draw(faults, seed)
        self.done: list[Fault] = []
        self.seconds_before = 0.0
        self.began = time.monotonic()
        self.until = None if minutes is None else self.began + 60 * minutes
        self.machine, self.verdict = machine_line(describe_machine()), "under way"
        self._read()

    # What is kept between commands

    @property
    def _state(self) -> Path:
        return self.folder / "soak.json"

    def _read(self) -> None:
        if not self._state.exists():
            return
        state = read_json_object(self._state)
        if (state["seed"], len(state["kinds"])) != (self.seed, len(self.kinds)):
            raise UserError(
                f"{self.folder}: holds a soak of {len(state['kinds'])} faults with seed "
                f"{state['seed']}; give these, or another --folder"
            )
        self.done = [Fault(**fault) for fault in state["done"]]
        self.seconds_before = state["seconds"]

    def keep(self) -> None:
        seconds = self.seconds_before + time.monotonic() - self.began
        done = [dataclasses.asdict(fault) for fault in self.done]
        state = {"seed": self.seed, "kinds": self.kinds, "seconds": seconds, "done": done}
        write_json(self._state, state)
        write_text(self.log, self.report(seconds))

    def report(self, seconds: float) -> str:
        lines = [
            f"# {self.machine}",
            f"# tests/soak.py --faults {len(self.kinds)} --seed {self.seed} --timeout "
            f"{self.timeout:g}: {len(self.done)} of {len(self.kinds)} faults in "
            f"{seconds / 60:.0f} minutes",
            f"# {self.verdict}",
            *(fault.line() for fault in self.done),
            "",
            f"{'kind':9s}  {'count':>5s}  {'not kept':>8s}  {'median seconds':>14s}  "
            f"{'most seconds':>12s}  {'most steps repeated':>19s}",
        ]
        for name in KINDS:
            of_kind = [fault for fault in self.done if fault.kind == name]
            kept = [fault for fault in of_kind if not fault.broken]
            line = f"{name:9s}  {len(of_kind):5d}  {len(of_kind) - len(kept):8d}"
            if kept:
                times = [fault.seconds for fault in kept]
                line += f"  {statistics.median(times):14.1f}  {max(times):12.1f}"
                line += f"  {max(fault.repeated for fault in kept):19d}"
            lines.append(line)
        return "\n".join(lines) + "\n"

    # The faults

    def run(self) -> bool:
        """Whether every promise was kept, that of the end among them."""
        config = self._prepare()
        total_steps = epoch_steps(config, RunArtifacts(config)) * config.train.epochs
        folder = config.run_dir / "train" / f"{config.train.methods[0]}-seed{config.train.seeds[0]}"
        if (folder / RESULT).exists():
            return self._compare(folder)
        run = SoakedTraining(self.folder, self.folder / SOAKED, folder, self.timeout)
        twin, ending = None, ""
        try:
            run.begin()
            run.wait_for_progress(run.newest, PROGRESS_SECONDS)
            twin = _start_twin(self.folder)
            # A damaged one must have one before it.
            beyond = max(run.newest, CHECKPOINT_STEPS)
            for number in range(len(self.done) + 1, len(self.kinds) + 1):
                if self.until is not None and time.monotonic() > self.until:
                    break
                fault, beyond = self._fault(run, number, beyond, total_steps)
                if fault is None:
                    break
                self.done.append(fault)
                self.keep()
                self._show(fault, run.step, total_steps)
            run.wait_for("end of the training", lambda: False, time.monotonic() + 3600)
            run.require_all_ended()
        except Broken as error:
            ending = self._without_folder(error)
            print(f"the training did not get to its end: {ending}", flush=True)
        finally:
            run.close()
        is_kept = self._compare(folder, twin, ending)
        if is_kept:
            subprocess.run(["umount", "-l", str(self.folder / "disk")], check=True)
        return is_kept

    def _without_folder(self, error: Broken) -> str:
        """What it says, without this machine's path, as one line."""
        return " ".join(str(error).replace(str(self.folder), "FOLDER").split())

    def _fault(
        self, run: SoakedTraining, number: int, beyond: int, total_steps: int
    ) -> tuple[Fault | None, int]:
        """The fault, None where the training has too few steps left; and the
        step that a checkpoint must be behind of before the next one.
        """
        name = self.kinds[number - 1]
        kind, chance = KINDS[name], random.Random(f"{self.seed} {number}")
        began, step, now = time.monotonic(), run.step, time.time()
        run.what = ""
        run.mark()
        try:
            run.wait_for_progress(beyond, PROGRESS_SECONDS)
            time.sleep(chance.uniform(0, 3))
            run.look()
            if run.is_finished or run.step > total_steps - LAST_STEPS:
                return None, beyond
            run.mark()
            beyond, step, began, now = run.newest, run.step, time.monotonic(), time.time()
            until = began + kind.patience * run.slowness
            kind.act(run, chance, until)
            if kind.goes_back:
                run.wait_for_resumption(now, until)
            else:
                run.wait_for_step(time.time(), until)
            seconds = time.monotonic() - began
            if not kind.goes_back and run.resumed[2] > now:
                raise Broken(f"the training went back to step {run.resumed[0]}")
            run.require_none_too_many()
            run.require_no_traceback()
        except Broken as error:
            run.begin_anew()
            seconds = round(time.monotonic() - began, 2)
            text = self._without_folder(error)
            broken = Fault(number, name, run.what, step, 0, 0, seconds, text)
            return broken, max(beyond, run.newest)
        from_step, repeated = run.resumed[:2] if kind.goes_back else (step, 0)
        return Fault(number, name, run.what, step, from_step, repeated, round(seconds, 2)), beyond

    def _show(self, fault: Fault, step: int, total_steps: int) -> None:
        """The fault, and how far all is."""
        spent = time.monotonic() - self.began + self.seconds_before
        rate = len(self.done) / spent
        left = (len(self.kinds) - len(self.done)) / rate
        print(
            f"{fault.line()}   [{len(self.done)} of {len(self.kinds)} faults, {60 * rate:.1f} a "
            f"minute, {left / 60:.0f} min left; step {step} of {total_steps}]",
            flush=True,
        )

    # The run and its twin

    def _prepare(self) -> Config:
        """Prepare both runs, which are trained from the same data and
        CF models; the configuration of the one that is disturbed.
        """
        disk, epochs = self.folder / "disk", len(self.kinds) * STEPS_PER_FAULT // EPOCH_STEPS + 6
        disk.mkdir(exist_ok=True)
        if not disk.is_mount():
            command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(disk)]
            if subprocess.run(command, capture_output=True).returncode:
                raise UserError(MISSING)
        launch = {"workers": WORKERS, "tp": 1, "timeout_seconds": self.timeout}
        sections = {
            "data": {
                "synthetic": {
                    "users": 24 * EPOCH_STEPS,
                    "items": 60,
                    "categories": 5,
                    "mean_length": 7.0,
                }
            },
            "backbone": {"num_layers": 2},
            "train": {
                "methods": ["ilrec"],
                "epochs": epochs,
                "checkpoint_steps": CHECKPOINT_STEPS,
                "validate_epochs": 10,
            },
        }
        soaked = tiny_config(
            disk / "runs",
            **sections,
            launch={**launch, "engine": "ray", "max_failures": 10_000},
            cf={"rewards": "actor"},
        )
        twin = tiny_config(self.folder / "runs", **sections, launch=launch)
        for config, path in ((soaked, SOAKED), (twin, UNDISTURBED)):
            write_text(self.folder / path, yaml.safe_dump(config_to_dict(config)))
        for stage in ("prepare", "index", "cf"):
            execute(twin, stage)
        if not soaked.run_dir.exists():
            made = shutil.ignore_patterns("train")
            shutil.copytree(twin.run_dir, soaked.run_dir, ignore=made)
        return soaked

    def _compare(
        self, folder: Path, twin: subprocess.Popen[bytes] | None = None, ending: str = ""
    ) -> bool:
        print("waiting for the training without faults", flush=True)
        code = (twin or _start_twin(self.folder)).wait()
        other = self.folder / "runs" / "tiny" / "train" / folder.name
        problems = [f"at the end: {ending}"] if ending else []
        if code:
            problems.append(f"the undisturbed training ended with {code}")
        if not problems and _weights(folder) != _weights(other):
            problems.append("the final or the best parameters differ from the undisturbed run's")
        if not problems and _losses(folder) != _losses(other):
            problems.append("the losses differ from the undisturbed run's")
        broken = sum(bool(fault.broken) for fault in self.done)
        if broken:
            problems.append(f"{broken} faults after which a promise was not kept")
        self.verdict = "; ".join(problems) or (
            "parameters and losses are those of the undisturbed run, bit for bit"
        )
        self.keep()
        print(self.verdict)
        return not problems


def _start_twin(folder: Path) -> subprocess.Popen[bytes]:
    """The training that nothing happens to."""
    with open(folder / "undisturbed.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ilrec_dist.cli", "train", str(folder / UNDISTURBED)],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )


def _weights(folder: Path) -> dict[str, str]:
    """SHA-256 of the manifests of the best and the final weights."""
    found: dict[str, str] = read_json_object(folder / RESULT)[WEIGHTS_SHA256]
    return found


def _losses(folder: Path) -> list[dict[str, float]]:
    """Losses and validations of all logged steps."""
    return [
        {key: line[key] for key in line if key.startswith(("step", "loss/", "validation/"))}
        for line in read_metrics(folder)
        if "loss/total" in line or any(key.startswith("validation/") for key in line)
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"example: {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", metavar="N", type=int, default=200, help="default: 200")
    parser.add_argument(
        "--seed", metavar="S", type=int, default=1, help="of their kinds and moments; default: 1"
    )
    parser.add_argument(
        "--folder",
        metavar="F",
        type=Path,
        default=Path(tempfile.gettempdir()) / "ilrec-soak",
        help="of runs and state; default: ilrec-soak among the temporary files",
    )
    parser.add_argument("--log", metavar="FILE", type=Path, help="default: soak.log in the folder")
    parser.add_argument(
        "--minutes",
        metavar="M",
        type=float,
        help="after so long no other fault; the training goes on to its end",
    )
    parser.add_argument(
        "--timeout",
        metavar="T",
        type=float,
        default=TIMEOUT_SECONDS,
        help=f"launch.timeout_seconds of the training, with which all that is waited for grows; "
        f"default: {TIMEOUT_SECONDS}, more for a busy machine",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.faults < 1:
        print("--faults: expected a number from 1 on", file=sys.stderr)
        return 2
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log = arguments.log or folder / "soak.log"
    # The cluster is closed then too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        options = (arguments.faults, arguments.seed, arguments.minutes, arguments.timeout)
        return 0 if Soak(folder, log, *options).run() else 1
    except UserError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("soak: interrupted; the same command goes on with the faults that are left")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
