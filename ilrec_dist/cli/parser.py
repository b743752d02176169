"""The words of the `ilrec` command line: commands, flags, help. Loads nothing heavy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NoReturn

from ilrec_dist import __version__
from ilrec_dist.common.errors import UserError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["_Parser"]

STAGES = {
    "prepare": "read a foreign data set, filter, split and store it as Parquet",
    "index": "give every item its code tuple and store the catalogue in code order",
    "cf": "train the collaborative-filtering models that reward likely tokens",
    "train": "train the configured methods and seeds",
    "evaluate": "evaluate on the test split and write results.json and report.html",
    "run": "all stages in order; what is unchanged is not run again, what was interrupted goes on",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake, in place of the usage and a line."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """The parser. `call` of what it returns names
    the function that does the command's work.
    """
    parser = _Parser(
        prog="ilrec",
        description="Train a language model as a recommender with self-hard negatives (ILRec).",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_stages(commands)
    _add_index_commands(commands)
    _add_plan(commands)
    _add_status(commands)
    _add_analyze(commands)
    _add_show_prompts(commands)
    _add_recommend(commands)
    _add_serve(commands)
    _add_export(commands)
    _add_export_data(commands)
    _add_study(commands)
    _add_config_command(commands)
    return parser


def _add_stages(commands: Commands) -> None:
    for name, what in STAGES.items():
        example = (
            f"example:\n  ilrec {name} configs/quickstart.yaml\n"
            f"  ilrec {name} configs/instruments-small.yaml train.epochs=3 launch.workers=2 "
            "launch.tp=2"
        )
        if name == "index":
            example += (
                "\nsee also:\n  ilrec index build --help    ilrec index add --help"
                "    ilrec index report --help"
            )
        command = _command(commands, name, what, example)
        _add_config(command)
        if name in ("run", "train"):
            command.add_argument(
                "--resume",
                action="store_true",
                help="go on with the run in the folder; refuse a folder of another configuration",
            )
        command.add_argument(
            "--verify",
            action="store_true",
            help="compare the files of finished stages with their SHA-256, "
            "not only by size and time",
        )
        if name in ("run", "prepare"):
            command.add_argument(
                "--max-bad-rows",
                metavar="N",
                help="skip up to N malformed rows and list them in rejects.jsonl "
                "(data.max_bad_rows)",
            )
        command.set_defaults(
            call="ilrec_dist.cli.stages:run_stage", command=name, resume=False, max_bad_rows=None
        )


def _add_index_commands(commands: Commands) -> None:
    what = (
        "the stage `index`, and its report as a table: codebook use, entropy, largest groups, "
        "collisions before and after"
    )
    command = _command(
        commands,
        "index build",
        what,
        "example:\n  ilrec index build configs/quickstart.yaml items.collisions=resolve",
    )
    _add_config(command)
    command.set_defaults(call="ilrec_dist.cli.stages:build_index", command="index build")
    example = (
        "example:\n  ilrec index add runs/quickstart --items new-items.csv "
        "--out runs/quickstart-index-2\n  ilrec run CONFIG items.index=FOLDER/index.json"
    )
    what = "give new items codes without changing an old one"
    command = _run_command(commands, "index add", what, example)
    command.set_defaults(call="ilrec_dist.cli.index_commands:run_add", command="index add")
    command.add_argument(
        "--items",
        required=True,
        metavar="NEW",
        help="CSV or Parquet with the columns item, title and, if wanted, text",
    )
    command.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="where the longer index is written; must not exist",
    )
    command.add_argument(
        "--vectors",
        nargs="+",
        default=[],
        metavar="X.npy",
        help="in place of texts, the new items' vectors, of the kind that the index was built "
        "from; or two files: the old items' vectors (in the order of index.json) and the new ones'",
    )
    example = (
        "example:\n  ilrec index report runs/quickstart --plot use.svg\n"
        "  ilrec index report PATH/Scientific.index.json"
    )
    what = "show an index as a table and a picture"
    command = _command(commands, "index report", what, example)
    command.set_defaults(call="ilrec_dist.cli.index_commands:run_report", command="index report")
    command.add_argument(
        "index", metavar="RUN|INDEX", help="a run's folder, an index's folder, or a NAME.index.json"
    )
    command.add_argument("--plot", metavar="X.svg", help="write a picture of the codes' use here")


def _add_plan(commands: Commands) -> None:
    command = _command(
        commands,
        "plan",
        "say what a training takes on a cluster, before anything starts: memory of a GPU by part, "
        "bytes a step, time; refuse what does not fit",
        "example:\n  ilrec plan configs/quickstart.yaml --nodes 4 --gpus-per-node 8 "
        "--gpu-memory 80GiB\nlaunch.workers is one for each GPU; docs/clusters.md explains the "
        "numbers",
    )
    _add_config(command)
    command.add_argument("--nodes", type=int, required=True, metavar="N")
    command.add_argument("--gpus-per-node", type=int, required=True, metavar="G")
    command.add_argument("--gpu-memory", required=True, metavar="80GiB", help="of one GPU")
    command.add_argument("--host-memory", metavar="512GiB", help="of a node; more is refused")
    for flag, default, what in (
        ("--interconnect", "400Gb/s", "of one GPU to another node"),
        ("--node-link", "450GB/s", "of one GPU within its node"),
        ("--gemm", "600TFLOP/s", "that one GPU reaches in bare matrix products"),
        ("--peak", "989TFLOP/s", "of one GPU's datasheet, for the MFU"),
        ("--memory-bandwidth", "3.3TB/s", "of one GPU"),
        ("--disk", "2GB/s", "of the run folder's file system, for the whole job"),
    ):
        command.add_argument(
            flag, default=default, metavar="SPEED", help=f"{what} (default {default})"
        )
    for flag in ("--items", "--users", "--interactions"):
        command.add_argument(
            flag, type=int, metavar="N", help="of the data, before `ilrec prepare` has counted"
        )
    command.set_defaults(call="ilrec_dist.cli.plan:run", command="plan")


def _add_status(commands: Commands) -> None:
    command = _command(
        commands,
        "status",
        "say how far a run is: stages, step, rate, remaining time, last checkpoint, workers, "
        "restarts and why",
        "example:\n  ilrec status runs/quickstart",
    )
    command.add_argument("run", metavar="RUN", help="the run's folder, on any machine that sees it")
    command.set_defaults(call="ilrec_dist.cli.status:run", command="status")


def _add_show_prompts(commands: Commands) -> None:
    command = _command(
        commands,
        "show-prompts",
        "show samples of a training on prompts as text and tokens, with the response marked",
        "example:\n  ilrec index CONFIG && ilrec show-prompts CONFIG --users 3",
    )
    _add_config(command)
    command.add_argument(
        "--users",
        type=int,
        default=3,
        metavar="N",
        help="users whose last sample is shown, and samples of every other task (default 3)",
    )
    command.set_defaults(call="ilrec_dist.cli.show_prompts:run", command="show-prompts")


def _add_analyze(commands: Commands) -> None:
    command = _command(
        commands,
        "analyze",
        "say why a trained method gains or not: its negatives, its terms' gradients, who gains",
        "example:\n  ilrec analyze runs/quickstart --users 1000",
    )
    command.add_argument("run", metavar="RUN", help="the folder of an evaluated run")
    _add_model_choice(command)
    command.add_argument(
        "--users",
        type=int,
        default=1000,
        metavar="N",
        help="validation users whose negatives and beams are looked at (default 1000)",
    )
    command.set_defaults(call="ilrec_dist.cli.analyze:run", command="analyze")


def _add_recommend(commands: Commands) -> None:
    command = _run_command(
        commands,
        "recommend",
        "recommend items for new histories with a trained run",
        "example:\n  ilrec recommend runs/quickstart --histories new-users.parquet --top 10 "
        "--exclude-seen --out recommendations.parquet launch.workers=1 launch.tp=1\n"
        "With --out the run's workers share the histories. What is interrupted goes on with the "
        "same command.",
    )
    command.set_defaults(call="ilrec_dist.cli.recommend:run", command="recommend")
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="launch.key=value",
        help="where and how it runs, in place of the run's own settings; with launch.workers=1 "
        "launch.tp=1 in this process",
    )
    command.add_argument(
        "--histories",
        required=True,
        metavar="X.parquet",
        help="columns: user (a string, on one row only and never null) and items (list of item "
        "ids, oldest first)",
    )
    command.add_argument(
        "--top", type=int, default=10, metavar="K", help="items per user (default 10)"
    )
    command.add_argument(
        "--out",
        metavar="OUT.parquet",
        help="where to write; without it the lists of the first 20 users are made here and printed",
    )
    _add_model_choice(command)
    _add_fusion(command)
    command.add_argument(
        "--exclude-seen",
        action="store_true",
        help="never recommend an item of the user's own history",
    )
    command.add_argument(
        "--allowed", metavar="items.txt", help="recommend only these items: one item id a line"
    )


def _add_serve(commands: Commands) -> None:
    command = _run_command(
        commands,
        "serve",
        "answer requests for recommendations over HTTP with a trained run",
        "example:\n  ilrec serve runs/quickstart --port 8080\n"
        '  curl -d \'{"histories": [["item1", "item2"]], "top": 5}\' '
        "http://127.0.0.1:8080/recommend",
    )
    command.set_defaults(call="ilrec_dist.cli.serve:run", command="serve")
    command.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (default: this machine only)"
    )
    command.add_argument("--port", type=int, default=8080, help="default 8080; 0 takes a free one")
    _add_model_choice(command)
    _add_fusion(command)


def _add_fusion(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--fusion",
        nargs="?",
        const="widest",
        metavar="SOURCES",
        help="mix the model with cf, or with cf+transitions, by the weights that the run's "
        "evaluation chose (evaluation.fusion); without a value with as many as it has",
    )


def _add_model_choice(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--method",
        metavar="NAME",
        help="whose weights, as in train.methods (default: the project's own where it was trained)",
    )
    command.add_argument(
        "--seed", type=int, help="the training seed whose weights are used (default: the first)"
    )


def _add_export(commands: Commands) -> None:
    command = _run_command(
        commands,
        "export",
        "write a trained model, its tokenizer and its catalogue "
        "as a folder that transformers loads",
        "example:\n  ilrec export runs/quickstart exported/model --dtype bfloat16",
    )
    command.set_defaults(call="ilrec_dist.cli.export_model:run", command="export")
    command.add_argument("out", metavar="DIR", help="a new folder")
    _add_model_choice(command)
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights' file (default float32)",
    )
    command.add_argument(
        "--merge",
        action="store_true",
        help="add LoRA adapters to the weights; otherwise they are written for PEFT",
    )


def _add_export_data(commands: Commands) -> None:
    command = _run_command(
        commands,
        "export-data",
        "write a run's interactions and items in the files of other systems, so that they run on "
        "the same split",
        "example:\n  ilrec export-data runs/quickstart --format recbole --out exported/Shop",
    )
    command.set_defaults(call="ilrec_dist.cli.export_data:run", command="export-data")
    command.add_argument(
        "--format",
        required=True,
        choices=("lcrec", "recbole"),
        help="NAME.inter.json, NAME.item.json and NAME.index.json, or NAME.inter and NAME.item",
    )
    command.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="a new folder; its name is the NAME of the files",
    )


def _add_study(commands: Commands) -> None:
    command = _command(
        commands,
        "study",
        "run a grid of methods, settings, seeds and data sets, and make one table of them",
        "examples:\n  ilrec study configs/study-quick.yaml\n"
        "  ilrec study configs/study-shop-ablations.yaml --low-priority\n"
        "  ilrec study configs/study-scientific.yaml data.path=PATH/scientific "
        "items.index=PATH/scientific/Scientific.index.json --estimate\n"
        "Cells that are done are not run again, interrupted ones go on. docs/studies.md says more.",
    )
    command.add_argument(
        "study", metavar="STUDY", help="a YAML file, such as configs/study-quick.yaml"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="with a point (key.sub=value) a setting of every cell, otherwise a key of the study "
        "such as seeds=[0]",
    )
    command.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="cells at once (default: as many as the cluster or this machine has room for)",
    )
    command.add_argument(
        "--low-priority", action="store_true", help="leave the machine to other work (niceness 19)"
    )
    command.add_argument(
        "--retry", action="store_true", help="run cells again that were refused, as by divergence"
    )
    command.add_argument(
        "--estimate",
        action="store_true",
        help="make what cells share, say how long the cells will take, and end",
    )
    command.add_argument(
        "--no-timing",
        action="store_true",
        help="do not time steps for the estimate where no cell is finished",
    )
    command.add_argument(
        "--into",
        metavar="FILE.md",
        help="also write the table into this file, between <!-- study NAME --> and "
        "<!-- end of study NAME -->, or at its end",
    )
    command.set_defaults(call="ilrec_dist.cli.study:run", command="study")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, found {text!r}")
    return int(text)


def _add_config_command(commands: Commands) -> None:
    command = _command(
        commands,
        "config",
        "print the resolved configuration",
        "example:\n  ilrec config configs/quickstart.yaml train.epochs=3",
    )
    _add_config(command)
    command.set_defaults(call="ilrec_dist.cli.print_config:print_config", command="config")


def _command(commands: Commands, name: str, what: str, epilog: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _run_command(commands: Commands, name: str, what: str, epilog: str) -> argparse.ArgumentParser:
    """A command on a finished run."""
    command = _command(commands, name, what, epilog)
    command.add_argument("run", metavar="RUN", help="the run's folder, such as runs/quickstart")
    return command


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config", metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key.sub=value",
        help="settings that replace the file's; docs/configuration.md lists all",
    )
