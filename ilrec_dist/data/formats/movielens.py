"""MovieLens 100K, 1M, 10M, 20M, 25M and 32M, each in the files its archive unpacks to."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_file
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.formats.delimited import Dialect, open_text, read_delimited
from ilrec_dist.data.formats.source import Source, item_rows

# Ratings file → (how it is split, its columns, movies file). "::" is read as ":" with empty columns between.
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
    "unknown,Action,Adventure,Animation,Children's,Comedy,Crime,Documentary,Drama,Fantasy,Film-Noir,Horror,Musical,Mystery,Romance,Sci-Fi,Thriller,War,Western"
).split(",")


def movielens_files(config: DataConfig) -> list[Path]:
    """The ratings and, where present, the movies. `data.path` is the archive's folder or the ratings file itself."""
    path = Path(config.path or "")
    folder = path.parent if path.is_file() else path
    ratings = (
        path
        if path.is_file()
        else next((folder / name for name in LAYOUTS if (folder / name).exists()), None)
    )
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
    return Source(
        ratings,
        timed=True,
        batches=lambda rejects: read_delimited(ratings, columns, {}, dialect, rejects),
        item_table=lambda: _movies(movies[0]) if movies else None,
        timestamp_unit="seconds since 1970",
    )


def _movies(path: Path) -> pa.Table:
    """Title and genres; the movie files are small, and the older ones are Latin-1."""
    ids, titles, texts = [], [], []
    encoding = "utf-8" if path.suffix == ".csv" or _is_utf8(path) else "latin-1"
    with open_text(path, encoding) as file:
        rows = (
            csv.reader(file)
            if path.suffix == ".csv"
            else (
                line.rstrip("\r\n").split("::" if path.suffix == ".dat" else "|") for line in file
            )
        )
        for number, row in enumerate(rows, 1):
            if (path.suffix == ".csv" and number == 1) or not any(row):
                continue
            if len(row) < 3:
                raise UserError(
                    f"{path}: line {number}: malformed row: {len(row)} fields, expected movie, title and genres"
                )
            genres = (
                [name for name, flag in zip(GENRES_100K, row[5:], strict=False) if flag == "1"]
                if path.name == "u.item"
                else row[2].split("|")
            )
            ids.append(row[0])
            titles.append(row[1] or None)
            texts.append(
                " ".join(genre for genre in genres if genre != "(no genres listed)") or None
            )
    return item_rows(ids, titles, texts)


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
