"""Locks that the processes of a killed command may still hold."""

import os
import threading

import pytest

from ilrec_dist.common.errors import NotWritable
from ilrec_dist.common.files import file_lock, inherit_lock


def test_a_holder_that_does_not_end_is_named(tmp_path):
    path = tmp_path / ".lock"
    named = f"{tmp_path}: process {os.getpid()} on .* still holds it after 0.1 s and may hang"
    handle = inherit_lock(path, 0.1)
    # Not a UserError, for which a command takes back what it has begun.
    with pytest.raises(NotWritable, match=named):
        inherit_lock(path, 0.1)
    os.close(handle)
    os.close(inherit_lock(path, 0.1))


def test_a_holder_that_ends_in_time_is_waited_for(tmp_path):
    path = tmp_path / ".lock"
    released = threading.Event()

    def hold() -> None:
        with file_lock(path):
            taken.set()
            released.wait()

    taken = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    threading.Timer(0.3, released.set).start()
    handle = inherit_lock(path, 30)
    assert released.is_set()
    os.close(handle)
    holder.join()


def test_a_lock_that_cannot_name_its_holder_is_let_go(tmp_path):
    path = tmp_path / ".lock"
    path.symlink_to("/dev/null")
    for _ in range(2):
        with pytest.raises(OSError):
            inherit_lock(path, 0.0)
