"""`data.split: chronological`: two points in time cut all users' interactions in three
parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig

# Every call gives all times again, in chunks.
Times = Callable[[], Iterator[np.ndarray]]
# The largest time of a file tells its unit: up to this number it is seconds (the year 5138, as
# milliseconds 1973), up to a thousand times as much milliseconds, and so on.
SECONDS_TO = 10**11
BIN_BITS = 16


@dataclass(frozen=True)
class Cuts:
    """Interactions before `validation` train, those before `test` validate, the rest
    test.

    Both are in the unit of the times that are kept.
    """

    validation: int
    test: int


def find_cuts(config: DataConfig, times: Times, rows: int) -> Cuts:
    """Cuts by data.split_dates, or by the shares of data.split_ratio.

    At most the shares lie before each cut: rows of one time are never parted. Raises
    UserError when nothing would lie before, between or after the cuts.
    """
    low, high = _range(times)
    if config.split_dates is not None:
        cuts = Cuts(*(_moment(text, high) for text in config.split_dates))
        setting = f"data.split_dates {config.split_dates}"
    else:
        train, validation, _ = config.split_ratio
        cuts = Cuts(
            *(
                time_at(times, min(int(share * rows + 1e-6), rows - 1), low, high)
                for share in (train, train + validation)
            )
        )
        setting = f"data.split_ratio {config.split_ratio}"
    if not low < cuts.validation < cuts.test <= high:
        raise UserError(
            f"{setting}: cuts at times {cuts.validation} and {cuts.test} leave training, "
            f"validation or test without interactions, which lie between {low} and {high}; "
            f"choose cuts that part them"
        )
    return cuts


def split_positions(
    lengths: np.ndarray, before: np.ndarray, cuts: Cuts
) -> tuple[np.ndarray, dict[str, Any]]:
    """(int32 [3, U], what the manifest says).

    Rows: the number of training interactions, the positions of the validation and of
    the test target in the sequence, -1 for none.

    lengths int64 [U]; before int64 [2, U]: interactions before each cut. A target is
    the user's last item between the cuts (after the second); a user without one there,
    or with nothing before it, is not evaluated. Raises UserError when no user is left
    to train on or to evaluate.
    """
    train, seen = before
    validation = np.where((seen > train) & (seen > 1), seen - 1, -1)
    test = np.where((lengths > seen) & (lengths > 1), lengths - 1, -1)
    users = {
        "training users": int((train > 1).sum()),
        "validation users": int((validation >= 0).sum()),
        "test users": int((test >= 0).sum()),
    }
    for what, count in users.items():
        if count == 0:
            raise UserError(
                f"data.split chronological: cuts at times {cuts.validation} and {cuts.test} "
                f"leave no {what}; choose others"
            )
    manifest = {
        "kind": "chronological",
        "validation_from": cuts.validation,
        "test_from": cuts.test,
        "training_interactions": int(train.sum()),
    }
    return np.stack([train, validation, test]).astype(np.int32), manifest | {
        what.replace(" ", "_"): count for what, count in users.items()
    }


def time_at(times: Times, rank: int, low: int, high: int) -> int:
    """The value at `rank` (from 0) when all values, which lie in [low, high], are in
    order.

    It is found by histograms, in passes of BIN_BITS bits each.
    """
    while low < high:
        shift = max(0, (high - low).bit_length() - BIN_BITS)
        counts = np.zeros((1 << BIN_BITS) + 1, np.int64)
        for part in times():
            # Unsigned, because a range may be wider than 2⁶³.
            distance = (part[(part >= low) & (part <= high)] - low).view(np.uint64)
            within = distance >> np.uint64(shift)
            counts += np.bincount(within.astype(np.int64), minlength=len(counts))
        below = np.cumsum(counts)
        bin_ = int(np.searchsorted(below, rank, side="right"))
        rank -= int(below[bin_ - 1]) if bin_ else 0
        low, high = low + (bin_ << shift), min(high, low + ((bin_ + 1) << shift) - 1)
    return low


def _range(times: Times) -> tuple[int, int]:
    ranges = [(int(part.min()), int(part.max())) for part in times() if len(part)]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _moment(text: str, latest: int) -> int:
    """A time in the unit of those that are kept.

    Integers are taken as they are, dates (UTC) in the unit in which the latest time is
    no later than the year 5138.
    """
    if re.fullmatch("-?[0-9]{1,19}", text):
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"data.split_dates: {text!r} is neither an ISO 8601 date, such as 2018-10-01, nor an "
            f"integer in the unit of the times that are kept"
        ) from None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(
        1970, 1, 1, tzinfo=UTC
    )
    a_second = next(
        unit for unit in (1, 10**3, 10**6, 10**9) if latest <= SECONDS_TO * unit or unit == 10**9
    )
    return since // timedelta(microseconds=1) * a_second // 10**6
