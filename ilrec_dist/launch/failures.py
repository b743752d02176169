"""Whether a worker's failure would come again: what it is, where
it arose, and whether another process is its cause.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

# Parts, in small letters, of the messages by which gloo, NCCL, torch's store and TCP say that the
# other side is gone, or silent.
LOST_PEER = (
    "broken pipe",
    "connection closed by",
    "closed the connection",
    "connection reset",
    "connection refused",
    "connection timed out",
    "connection was likely closed",
    "no route to host",
    "socket closed",
    "socket timeout",
    "timed out",
    "timeout caused",
    "wait timeout",
    "collective operation timeout",
    # NCCL's kind of error where another process has ended.
    "ncclremoteerror",
    "remote process exited",
    "communicator was aborted",
)
# torch's exceptions of the store and of sockets, behind which another process is.
OF_THE_NETWORK = {"DistNetworkError", "DistStoreError"}
# How torch and NumPy say that memory is missing, where the kind of error does not.
NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
# What differs between two attempts that fail alike: addresses, names of processes, actors and of
# shared memory, ports.
OF_ONE_ATTEMPT = (
    r"0x[0-9a-f]+",
    r"\b[0-9a-f]{16,}\b",
    r"(?<=/nccl-)\w+",
    r"(?i:(?<=\bpid)|(?<=\bprocess)|(?<=\bport))[ =:]*\d+",
    r"(?<=[\w\]]):\d{4,5}\b",
    r"(?<=[\w\]])<\d+>",
)


def is_of_another_rank(error: Exception) -> bool:
    """Whether the failure only says that another
    process of the group, or an actor, is gone.
    """
    kinds = _kinds(error)
    if kinds & OF_THE_NETWORK or isinstance(error, ConnectionError):
        return True
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    if "ray" in modules:
        # An error that an actor has raised is not its end.
        return "RayTaskError" not in kinds
    text = str(error).lower()
    return any(words in text for words in LOST_PEER) and not _is_memory(error)


def describe(error: Exception) -> str:
    """One line: the kind of failure, its message
    without addresses, and where it arose.
    """
    message = re.sub(r"0x[0-9a-f]+", "0x…", _message(error))
    return f"{type(error).__name__}: {message} ({_origin(error)})"


def identity(error: Exception) -> str:
    """Equal for failures that are the same: `describe`
    without what differs between attempts that fail alike.

    Of missing memory only the kind and the place: how much
    was free, and who had it, never is the same twice.
    """
    if _is_memory(error):
        return f"{type(error).__name__}: memory ({_origin(error)})"
    message = re.sub("|".join(OF_ONE_ATTEMPT), "…", _message(error))
    return f"{type(error).__name__}: {message} ({_origin(error)})"


def _is_memory(error: Exception) -> bool:
    text = str(error).lower()
    by_kind = isinstance(error, MemoryError) or "OutOfMemoryError" in _kinds(error)
    return by_kind or any(words in text for words in NO_MEMORY)


def _kinds(error: Exception) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def _message(error: Exception) -> str:
    """The message on one line; that of an actor's
    error without the traceback in the actor.
    """
    cause = getattr(error, "cause", None)
    return " ".join(str(cause if isinstance(cause, Exception) else error).split())


def _origin(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
