"""MovieLens 100K, 1M, 10M, 20M, 25M and 32M, each in the files its archive
unpacks to.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_file
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.reading.delimited import Dialect, read_delimited
from ilrec_dist.data.reading.item_table import item_rows
from ilrec_dist.data.reading.source import Format, Source
from ilrec_dist.data.reading.streams import open_text
from ilrec_dist.data.reading.times import Times

# Ratings file → (how it is split, its columns, movies file). "::" is read as ":" with empty
# columns between.
LAYOUTS: dict[str, tuple[Dialect, dict[str, str], str]] = {
    "ratings.csv": (
        Dialect(","),
        {"user": "userId", "item": "movieId", "time": "timestamp"},
        "movies.csv",
    ),
    "ratings.dat": (
        Dialect(":", ["user", "1", "item", "3", "rating", "5", "time"], quoted=False),
        {"user": "user", "item": "item", "time": "time"},
        "movies.dat",
    ),
    "u.data": (
        Dialect("\t", ["user", "item", "rating", "time"], quoted=False),
        {"user": "user", "item": "item", "time": "time"},
        "u.item",
    ),
}
GENRES_100K = (
    "unknown,Action,Adventure,Animation,Children's,Comedy,Crime,Documentary,Drama,Fantasy,"
    "Film-Noir,Horror,Musical,Mystery,Romance,Sci-Fi,Thriller,War,Western"
).split(",")


def movielens_files(config: DataConfig) -> list[Path]:
    """The ratings and, where present, the movies.

    `data.path` is the archive's folder or the ratings file itself.
    """
    path = Path(config.path or "")
    folder = path.parent if path.is_file() else path
    candidates = [path] if path.is_file() else [folder / name for name in LAYOUTS]
    ratings = next((file for file in candidates if file.exists()), None)
    if ratings is None or ratings.name not in LAYOUTS:
        raise UserError(
            f"{path}: expected a MovieLens folder with one of {', '.join(LAYOUTS)} (data.path)"
        )
    movies = folder / LAYOUTS[ratings.name][2]
    return [require_file(ratings, "data.path"), *([movies] if movies.exists() else [])]


def read_movielens(config: DataConfig) -> Source:
    """Every rating is an interaction, whatever its stars."""
    ratings, *movies = movielens_files(config)
    dialect, columns, _ = LAYOUTS[ratings.name]
    times = Times()

    def unit() -> str:
        # The archives have integers in seconds. Decimal seconds are kept in thousandths, and
        # dates, as others write them into these files, in milliseconds.
        return f"{'seconds' if times.kind in (None, 'integer') else 'milliseconds'} since 1970"

    return Source(
        ratings,
        timed=True,
        batches=lambda rejects: read_delimited(ratings, columns, {}, dialect, rejects, times),
        item_table=lambda: _movies(movies[0]) if movies else None,
        item_file=movies[0] if movies else None,
        timestamp_unit=unit,
    )


def _movies(path: Path) -> pa.Table:
    """Title and genres."""
    ids, titles, texts = [], [], []
    for number, row in _rows(path):
        if len(row) < 3:
            raise UserError(
                f"{path}: line {number}: malformed row: {len(row)} fields, "
                f"expected movie, title and genres"
            )
        genres = row[2].split("|")
        if path.name == "u.item":
            flags = zip(GENRES_100K, row[5:], strict=False)
            genres = [genre for genre, flag in flags if flag == "1"]
        ids.append(row[0])
        titles.append(row[1])
        texts.append(" ".join(genre for genre in genres if genre != "(no genres listed)"))
    return item_rows(ids, titles, texts)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of the rows.

    The movie files are small, the older ones Latin-1.
    """
    is_csv = path.suffix == ".csv"
    with open_text(path, "utf-8" if is_csv or _is_utf8(path) else "latin-1") as file:
        if not is_csv:
            delimiter = "::" if path.suffix == ".dat" else "|"
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n").split(delimiter)
            return
        reader = csv.reader(file)
        try:
            next(reader, None)
            for row in reader:
                if any(row):
                    yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: malformed row: {error}") from None


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


FORMAT = Format(read_movielens, movielens_files)
