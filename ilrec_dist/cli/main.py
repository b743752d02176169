"""`ilrec`: parse, call one function, turn its errors into one line and an exit code."""

from __future__ import annotations

import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ilrec_dist.cli.parser import build_parser
from ilrec_dist.common.disk import not_writable
from ilrec_dist.common.errors import NotWritable, UserError, WorkersFailed
from ilrec_dist.common.loading import load_function
from ilrec_dist.common.stop_request import TERMINATED
from ilrec_dist.common.terminal import one_line, written_out

INDEX_COMMANDS = ("build", "add", "report")
GOES_ON = "the same command goes on where it stopped"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0, or 2 with one line on stderr for the user's own errors, 1 when the workers
    failed, nothing can be written or an error was not foreseen, 130 after
    Ctrl-C, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["index"] and words[1:2] and words[1] in INDEX_COMMANDS:
        # `ilrec index CONFIG` stays the stage.
        words[:2] = [" ".join(words[:2])]
    with _terminated_as_interrupted() as signals:
        try:
            _run(words)
            return 0
        except UserError as error:
            _say_error(str(error))
            return 2
        except WorkersFailed as error:
            _say_error(str(error))
            return 1
        except (NotWritable, OSError) as error:
            refused = not_writable(error, Path.cwd())
            if refused is None:
                return _unforeseen(error)
            _say_error(f"{refused}, and give the same command again")
            return 1
        except KeyboardInterrupt:
            if signals:
                print(f"ilrec: terminated; {GOES_ON}", file=sys.stderr)
                return 128 + signal.SIGTERM
            print(f"ilrec: interrupted; {GOES_ON}", file=sys.stderr)
            return 128 + signal.SIGINT
        except Exception as error:
            return _unforeseen(error)


def _unforeseen(error: Exception) -> int:
    """Leave the traceback in a file, and one line on stderr."""
    words = f"{type(error).__name__}: {error}"
    text = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="ilrec-traceback-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError:
        print(written_out(text), file=sys.stderr)
        path = "what stands above"
    _say_error(
        f"an error that is not foreseen, {words}; its traceback is in {path}: please report it"
    )
    return 1


def _say_error(words: str) -> None:
    """One line; some of the words may be those of files that strangers wrote."""
    print(f"ilrec: error: {one_line(' '.join(words.split()))}", file=sys.stderr)


def _run(words: list[str]) -> None:
    arguments, unparsed = build_parser().parse_known_args(words)
    takes_settings = hasattr(arguments, "overrides")
    if unparsed and (not takes_settings or any(word.startswith("-") for word in unparsed)):
        raise UserError(
            f"unrecognized arguments: {' '.join(unparsed)}; see `ilrec {arguments.command} --help`"
        )
    if unparsed:
        # Settings may stand behind a flag too.
        arguments.overrides += unparsed
    load_function(arguments.call)(arguments)


@contextmanager
def _terminated_as_interrupted() -> Iterator[list[int]]:
    """Let SIGTERM end the block as Ctrl-C does;
    yields a list that then holds the signal.
    """
    signals: list[int] = []
    TERMINATED.clear()

    def interrupt(number: int, _: FrameType | None) -> None:
        signals.append(number)
        TERMINATED.set()
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        # Only the main thread may.
        yield signals
        return
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
