"""Amazon reviews and metadata on samples as their publisher writes them."""

from __future__ import annotations

import gzip
import json

import pytest

from ilrec_dist.common.errors import UserError
from tests.support.loading import load

REVIEWS_2018 = [
    {
        "overall": 5.0,
        "verified": True,
        "reviewTime": "01 1, 2018",
        "reviewerID": "A1",
        "asin": "B00A",
        "style": {"Size:": " M"},
        "unixReviewTime": 1514764800,
    },
    {
        "overall": 1.0,
        "reviewerID": "A1",
        "asin": "B00C",
        "reviewText": 'a "quoted" {brace}',
        "vote": "3",
        "unixReviewTime": 1514764700,
    },
    {
        "overall": 4.0,
        "reviewerID": "A1",
        "asin": "B00B",
        "unixReviewTime": 1514764900,
        "image": ["https://example.com/1.jpg"],
    },
]
META_2018 = [
    {
        "category": ["Music", "Strings"],
        "description": ["Bright", "and warm"],
        "title": "Strings &amp; more",
        "brand": "Elix",
        "asin": "B00A",
        "price": "$5",
    },
    {"category": [], "description": [], "title": "", "brand": "", "asin": "B00B"},
    {"title": "twice", "asin": "B00B"},
]
REVIEWS_2023 = [
    {
        "rating": 5.0,
        "title": "x",
        "images": [],
        "asin": "B01",
        "parent_asin": "P1",
        "user_id": "AGBF",
        "timestamp": 1588687728923,
        "helpful_vote": 0,
    },
    {
        "rating": 5.0,
        "title": "y",
        "images": [{"s": 1}],
        "asin": "B02",
        "parent_asin": "P2",
        "user_id": "AGBF",
        "timestamp": 1588687728922,
    },
    {
        "rating": 2.0,
        "asin": "B03",
        "parent_asin": "P3",
        "user_id": "AGBF",
        "timestamp": 1588687728924,
    },
]
META_2023 = [
    {
        "main_category": "All Beauty",
        "title": "Brush",
        "features": ["soft"],
        "description": [],
        "store": "S",
        "categories": [],
        "parent_asin": "P1",
    }
]


def write_jsonl(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl.gz"])
def test_amazon_2018(tmp_path, ending):
    path, meta = (
        write_jsonl(tmp_path / f"reviews.{ending}", REVIEWS_2018),
        write_jsonl(tmp_path / f"meta.{ending}", META_2018),
    )
    manifest, histories, titles, texts = load(tmp_path, "amazon", path, items_path=str(meta))
    assert (
        histories == {"A1": ["B00C", "B00A", "B00B"]}
        and manifest["timestamps"] == "seconds since 1970"
    )
    assert (
        titles == {"B00A": "Strings &amp; more", "B00B": "", "B00C": ""}
        and texts["B00A"] == "Elix Music Strings Bright and warm"
    )


def test_amazon_2023(tmp_path):
    path, meta = (
        write_jsonl(tmp_path / "reviews.jsonl.gz", REVIEWS_2023),
        write_jsonl(tmp_path / "meta.jsonl", META_2023),
    )
    manifest, histories, titles, texts = load(tmp_path, "amazon", path, items_path=str(meta))
    assert (
        histories == {"AGBF": ["P2", "P1", "P3"]}
        and manifest["timestamps"] == "milliseconds since 1970"
    )
    assert titles["P1"] == "Brush" and texts["P1"] == "S All Beauty soft"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"reviewerID": "A1", "asin": ', "malformed JSON at column 30"),
        (
            '{"reviewerID": "A1", "asin": 7, "unixReviewTime": 1}',
            "field 'asin' is 7, expected a string",
        ),
        (
            '{"reviewerID": "A1", "asin": "x", "unixReviewTime": "soon"}',
            "field 'unixReviewTime' is 'soon', expected an integer",
        ),
        ('{"reviewerID": "A1", "unixReviewTime": 1}', "no item id"),
        ('{"reviewerID": "A1", "asin": "x"}', "time None"),
        ("[1]", "expected a JSON object, found list"),
        (
            r'{"reviewerID": "A1", "asin": "x", "reviewText": "so good \ud83d", '
            r'"unixReviewTime": 1}',
            r"an escape such as \\ud83d without",
        ),
        (
            r'{"reviewerID": "A\ud83d", "asin": "x", "unixReviewTime": 1}',
            r"an escape such as \\ud83d without",
        ),
        (
            '{"reviewerID": "A1", "asin": "x", "asin": "y", "unixReviewTime": 1}',
            "field 'asin' is given twice",
        ),
        (
            '{"reviewerID": "A1", "asin": "x", "unixReviewTime": 99999999999999999999}',
            "field 'unixReviewTime' is 99999999999999999999, expected an integer of 64",
        ),
        (
            '{"reviewerID": "A1", "asin": "x", "unixReviewTime": ' + "9" * 5000 + "}",
            "malformed JSON: Exceeds the limit",
        ),
        (
            '{"reviewerID": "A1", "asin": "x", "unixReviewTime": 1} {"reviewerID": "A1"}',
            "malformed JSON at column 56: Extra data",
        ),
        (
            '{"reviewerID": "A1", "asin": "x", "unixReviewTime": 1.5}',
            "field 'unixReviewTime' is 1.5, expected an integer",
        ),
        ("\0", "malformed JSON at column 1"),
    ],
)
def test_bad_reviews_are_refused_or_counted(tmp_path, line, reason):
    path = write_jsonl(tmp_path / "reviews.jsonl", [REVIEWS_2018[0], "", line, *REVIEWS_2018[1:]])
    with pytest.raises(UserError, match=f"reviews.jsonl: line 3: {reason}"):
        load(tmp_path, "amazon", path)
    manifest, histories, _, _ = load(tmp_path, "amazon", path, max_bad_rows=1)
    assert manifest["read"]["bad_rows"] == 1 and histories == {"A1": ["B00C", "B00A", "B00B"]}


def test_reviews_with_bytes_that_are_no_text(tmp_path):
    path = write_jsonl(tmp_path / "reviews.jsonl", REVIEWS_2018)
    path.write_bytes(
        b"\xef\xbb\xbf"
        + path.read_bytes()
        + b'{"reviewerID": "A1", "asin": "B\xff", "unixReviewTime": 1514764600}\n'
    )
    with pytest.raises(UserError, match=r"reviews.jsonl: line 4: not UTF-8 text"):
        load(tmp_path, "amazon", path)
    assert load(tmp_path, "amazon", path, max_bad_rows=1)[1] == {"A1": ["B00C", "B00A", "B00B"]}


def test_only_bad_reviews_are_looked_at_one_by_one(tmp_path, monkeypatch):
    """Of 2,000 reviews, 6 of them bad, only the bad lines become Python objects."""
    from ilrec_dist.data.formats import amazon

    reviews = [
        json.dumps(
            {"reviewerID": f"A{number % 50}", "asin": f"B{number % 40}", "unixReviewTime": number}
        )
        for number in range(2000)
    ]
    for place, text in (
        (0, "{"),
        (1, r'{"reviewerID": "\ud83d"}'),
        (900, "[]"),
        (1500, " \r"),
        (1501, "\n"),
        (1502, "oops"),
        (1998, "{}}"),
        (1999, "{"),
    ):
        reviews[place] = text
    path = write_jsonl(tmp_path / "reviews.jsonl", reviews)
    looked_at = []
    complaint = amazon._complaint
    monkeypatch.setattr(
        amazon, "_complaint", lambda line, schema: looked_at.append(line) or complaint(line, schema)
    )
    manifest, histories, _, _ = load(tmp_path, "amazon", path, max_bad_rows=6)
    assert (
        len(looked_at) == 6 == manifest["read"]["bad_rows"]
        and sum(map(len, histories.values())) == 1992
    )
    rejects = [
        json.loads(line)["line"]
        for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    ]
    assert rejects == [1, 2, 901, 1504, 2000, 2001], "a blank line is a line"
    with pytest.raises(UserError, match=r"reviews.jsonl: line 1: malformed JSON at column 1"):
        load(tmp_path, "amazon", path)


def test_metadata_with_half_a_surrogate_pair(tmp_path):
    path = write_jsonl(tmp_path / "reviews.jsonl", REVIEWS_2018)
    meta = write_jsonl(
        tmp_path / "meta.jsonl", [r'{"asin": "B00A", "title": "Strings \ud83d", "brand": "Elix"}']
    )
    assert load(tmp_path, "amazon", path, items_path=str(meta))[2]["B00A"] == "Strings ?"
    meta = write_jsonl(
        tmp_path / "meta.jsonl", [META_2018[0], r'{"asin": "B\ud83d", "title": "Strings"}']
    )
    with pytest.raises(
        UserError, match="meta.jsonl: line 2: expected a JSON object with the field 'asin'"
    ):
        load(tmp_path, "amazon", path, items_path=str(meta))


def test_amazon_blocks_of_any_size_give_the_same_rows(tmp_path):
    from ilrec_dist.data.reading.lines import line_blocks

    path = write_jsonl(tmp_path / "reviews.jsonl", REVIEWS_2018 * 3)
    whole = path.read_bytes()
    for size in (1, 7, 100, 10_000):
        blocks = list(line_blocks(path, size))
        assert b"".join(block for block, _ in blocks) == whole
        assert [first for _, first in blocks] == [
            1 + whole[: sum(len(block) for block, _ in blocks[:index])].count(b"\n")
            for index in range(len(blocks))
        ]
