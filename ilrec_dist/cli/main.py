"""`ilrec`: parse, load the configuration, call one function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ilrec_dist import __version__
from ilrec_dist.common.errors import UserError, WorkersFailed

STAGES = {
    "prepare": "read a foreign data set, filter, split and store it as Parquet",
    "index": "give every item its code tuple and store the catalogue in code order",
    "cf": "train the collaborative-filtering models that reward likely tokens",
    "train": "train the configured methods and seeds",
    "evaluate": "evaluate on the test split and write results.json and report.html",
    "run": "all stages in order; what is unchanged is not run again, what was interrupted goes on",
}

INDEX_COMMANDS = ("build", "add", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr for the user's own errors."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["index"] and words[1:2] and words[1] in INDEX_COMMANDS:
        words[:2] = [" ".join(words[:2])]  # `ilrec index CONFIG` stays the stage
    try:
        arguments, rest = _parser().parse_known_args(words)
        if rest and (
            not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)
        ):
            raise UserError(
                f"unrecognized arguments: {' '.join(rest)}; see `ilrec {arguments.command} --help`"
            )
        if rest:
            arguments.overrides += rest  # settings may stand behind a flag too
        return int(arguments.call(arguments) or 0)
    except UserError as error:
        print(f"ilrec: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except WorkersFailed as error:
        print(f"ilrec: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ilrec: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake, in place of the usage and a line."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ilrec",
        description="Train a language model as a recommender with self-hard negatives (ILRec).",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, what in STAGES.items():
        example = f"example:\n  ilrec {name} configs/quickstart.yaml\n  ilrec {name} configs/instruments-small.yaml train.epochs=3 launch.workers=2 launch.tp=2"
        if name == "index":
            example += "\nsee also:\n  ilrec index build --help    ilrec index add --help    ilrec index report --help"
        command = _command(commands, name, what, example)
        _add_config(command)
        if name in ("run", "train"):
            command.add_argument(
                "--resume",
                action="store_true",
                help="go on with the run in the folder; refuse a folder of another configuration",
            )
        if name in ("run", "prepare"):
            command.add_argument(
                "--max-bad-rows",
                metavar="N",
                help="skip up to N malformed rows and list them in rejects.jsonl (data.max_bad_rows)",
            )
        command.set_defaults(call=_stage, command=name, resume=False, max_bad_rows=None)
    _add_index_commands(commands)
    command = _command(
        commands,
        "recommend",
        "recommend items for new histories with a trained run",
        _RECOMMEND_EXAMPLE,
    )
    command.add_argument("run", metavar="RUN", help="the run's folder, such as runs/quickstart")
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
        "--out", metavar="OUT.parquet", help="where to write; without it a table is printed"
    )
    command.add_argument(
        "--method",
        metavar="NAME",
        help="whose weights, as in train.methods (default: the project's own where it was trained)",
    )
    command.add_argument(
        "--seed",
        type=int,
        help="the training seed whose weights are used (default: the run's first)",
    )
    command.add_argument(
        "--exclude-seen",
        action="store_true",
        help="never recommend an item of the user's own history",
    )
    command.add_argument(
        "--allowed", metavar="items.txt", help="recommend only these items: one item id a line"
    )
    command.set_defaults(call=_recommend, command="recommend")
    command = _command(
        commands,
        "export-data",
        "write a run's interactions and items in the files of other systems, so that they run on the same split",
        _EXPORT_EXAMPLE,
    )
    command.add_argument("run", metavar="RUN", help="the run's folder, such as runs/quickstart")
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
    command.set_defaults(call=_export_data, command="export-data")
    command = _command(
        commands,
        "config",
        "print the resolved configuration",
        "example:\n  ilrec config configs/quickstart.yaml train.epochs=3",
    )
    _add_config(command)
    command.set_defaults(call=_config, command="config")
    return parser


def _add_index_commands(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    what = "the stage `index`, and its report as a table: codebook use, entropy, largest groups, collisions before and after"
    command = _command(
        commands,
        "index build",
        what,
        "example:\n  ilrec index build configs/quickstart.yaml items.collisions=resolve",
    )
    _add_config(command)
    command.set_defaults(call=_index_build, command="index build")
    example = "example:\n  ilrec index add runs/quickstart --items new-items.csv --out runs/quickstart-index-2\n  ilrec run CONFIG items.index=FOLDER/index.json"
    command = _command(
        commands, "index add", "give new items codes without changing an old one", example
    )
    command.add_argument("run", metavar="RUN", help="the run whose index is extended")
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
    command.set_defaults(call=_index_add, command="index add")
    example = "example:\n  ilrec index report runs/quickstart --plot use.svg\n  ilrec index report PATH/Scientific.index.json"
    command = _command(commands, "index report", "show an index as a table and a picture", example)
    command.add_argument(
        "index", metavar="RUN|INDEX", help="a run's folder, an index's folder, or a NAME.index.json"
    )
    command.add_argument("--plot", metavar="X.svg", help="write a picture of the codes' use here")
    command.set_defaults(call=_index_report, command="index report")


_RECOMMEND_EXAMPLE = "example:\n  ilrec recommend runs/quickstart --histories new-users.parquet --top 10 --exclude-seen --out recommendations.parquet"

_EXPORT_EXAMPLE = (
    "example:\n  ilrec export-data runs/quickstart --format recbole --out exported/Shop"
)


def _command(
    commands: argparse._SubParsersAction, name: str, what: str, epilog: str
) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    sentence = what[0].upper() + what[1:] + "."
    return commands.add_parser(
        name,
        help=what,
        description=sentence,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


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


def _stage(arguments: argparse.Namespace) -> None:
    from ilrec_dist.config.load import load_config
    from ilrec_dist.pipeline.run import execute

    flags = (
        [] if arguments.max_bad_rows is None else [f"data.max_bad_rows={arguments.max_bad_rows}"]
    )
    execute(
        load_config(arguments.config, arguments.overrides + flags),
        arguments.command,
        resume=arguments.resume,
    )


def _index_build(arguments: argparse.Namespace) -> None:
    from ilrec_dist.cli.index_commands import report_index
    from ilrec_dist.config.load import load_config
    from ilrec_dist.pipeline.run import execute

    config = load_config(arguments.config, arguments.overrides)
    execute(config, "index")
    print(report_index(config.run_dir))


def _index_add(arguments: argparse.Namespace) -> None:
    from ilrec_dist.cli.index_commands import add_to_index

    vectors = [Path(path) for path in arguments.vectors]
    print(add_to_index(Path(arguments.run), Path(arguments.items), Path(arguments.out), vectors))


def _index_report(arguments: argparse.Namespace) -> None:
    from ilrec_dist.cli.index_commands import report_index

    print(report_index(Path(arguments.index), Path(arguments.plot) if arguments.plot else None))


def _config(arguments: argparse.Namespace) -> None:
    from ilrec_dist.config.load import dump_config, load_config

    sys.stdout.write(dump_config(load_config(arguments.config, arguments.overrides)))


def _export_data(arguments: argparse.Namespace) -> None:
    from ilrec_dist.export.interactions import export_run

    export_run(Path(arguments.run), arguments.format, Path(arguments.out))


def _recommend(arguments: argparse.Namespace) -> None:
    from ilrec_dist.cli.recommend import recommend

    recommend(
        Path(arguments.run),
        Path(arguments.histories),
        top=arguments.top,
        out=Path(arguments.out) if arguments.out else None,
        method=arguments.method,
        seed=arguments.seed,
        exclude_seen=arguments.exclude_seen,
        allowed=Path(arguments.allowed) if arguments.allowed else None,
    )


if __name__ == "__main__":
    sys.exit(main())
