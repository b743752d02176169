"""Every foreign format on a sample as its publisher writes it, and the exports back."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.prepare import prepare
from ilrec_dist.export.interactions import export_data
from ilrec_dist.items.build import build_index
from ilrec_dist.items.config import ItemsConfig


def load(tmp_path, form, path, **settings):
    manifest = prepare(
        DataConfig(
            format=form,
            path=str(path),
            min_user_interactions=1,
            min_item_interactions=1,
            **settings,
        ),
        tmp_path / "out",
    )
    dataset = load_dataset(tmp_path / "out")
    histories = {
        dataset.user_ids[user]: [dataset.item_ids[item] for item in dataset.sequence(user)]
        for user in range(dataset.num_users)
    }
    titles = dict(zip(dataset.item_ids, dataset.titles or [None] * dataset.num_items, strict=True))
    texts = dict(zip(dataset.item_ids, dataset.texts or [None] * dataset.num_items, strict=True))
    return manifest, histories, titles, texts


RECBOLE_INTER = """user_id:token\titem_id:token\trating:float\ttimestamp:float
196\t242\t3\t881250949
196\t302\t3\t881250948
196\t377\t1\t878887116
22\t377\t1\t878887117
22\t51\t2\t880606923.5
22\t346\t1\t886397596
"""
RECBOLE_ITEM = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
242\tKolya\t1996\tComedy
302\tL.A. "Confidential"\t1997\tCrime Film-Noir
377\tHeavyweights\t1994\tChildren's Comedy
377\tHeavyweights again\t1994\tComedy
51\t\t\tDrama
"""


def test_recbole(tmp_path):
    (tmp_path / "ml.inter").write_text(RECBOLE_INTER)
    (tmp_path / "ml.item").write_text(RECBOLE_ITEM)
    manifest, histories, titles, texts = load(tmp_path, "recbole", tmp_path)
    assert histories == {"22": ["377", "51", "346"], "196": ["377", "302", "242"]}
    assert titles == {
        "51": "",
        "242": "Kolya",
        "302": 'L.A. "Confidential"',
        "346": "",
        "377": "Heavyweights",
    }
    assert texts["302"] == "1997 Crime Film-Noir" and texts["51"] == "Drama"
    assert set(manifest["inputs"]) == {"ml.inter", "ml.item"}


def test_recbole_errors(tmp_path):
    (tmp_path / "ml.inter").write_text("uid:token\titem_id:token\n1\t2\n")
    with pytest.raises(
        UserError,
        match=r"ml\.inter: no column user_id:token; the header has: uid:token, item_id:token",
    ):
        load(tmp_path, "recbole", tmp_path / "ml.inter")
    (tmp_path / "ml.inter").write_text(RECBOLE_INTER + "22\t7\n")
    with pytest.raises(UserError, match=r"ml\.inter: line 8: malformed row: 2 fields, expected 4"):
        load(tmp_path, "recbole", tmp_path / "ml.inter")


def test_a_bad_row_of_recbole_items_is_refused_without_advice_that_does_not_help(tmp_path):
    (tmp_path / "ml.inter").write_text(RECBOLE_INTER)
    (tmp_path / "ml.item").write_text(RECBOLE_ITEM + "22\tSeven\n")
    for allowed in (0, 5):
        with pytest.raises(
            UserError,
            match=r"ml\.item: line 7: malformed row: 2 fields, expected 4 \('\\t'-separated\); mend it: items are not skipped$",
        ):
            load(tmp_path, "recbole", tmp_path, max_bad_rows=allowed)


def test_recbole_items_without_a_text(tmp_path):
    (tmp_path / "ml.inter").write_text(RECBOLE_INTER)
    (tmp_path / "ml.item").write_text(
        "item_id:token\tyear:token\tname:token\tclass:token_seq\n242\t\tA\t\n302\t1997\tB\t\n377\t\t\tComedy  Crime\n51\t1990\tC\tDrama\n"
    )
    _, _, titles, texts = load(tmp_path, "recbole", tmp_path)
    assert titles == {"242": "A", "302": "B", "377": "", "51": "C", "346": ""}
    assert texts == {
        "242": "",
        "302": "1997",
        "377": "Comedy  Crime",
        "51": "1990 Drama",
        "346": "",
    }


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
            r'{"reviewerID": "A1", "asin": "x", "reviewText": "so good \ud83d", "unixReviewTime": 1}',
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
    """Of 2,000 reviews, 6 of them bad and some lines blank, no other line becomes a Python object."""
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


MOVIELENS = {
    "100k": {
        "u.data": "196\t242\t3\t881250949\n196\t302\t3\t881250948\n196\t377\t1\t878887116\n",
        "u.item": "242|Kolya (1996)|24-Jan-1997||http://x|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "302|L\xe9on (1994)|x||y|0|0|0|0|0|0|1|0|1|0|0|0|0|0|0|0|0|0|0\n",
    },
    "1m": {
        "ratings.dat": "196::242::3::881250949\n196::302::3::881250948\n196::377::1::878887116\n",
        "movies.dat": "242::Kolya (1996)::Comedy\n302::L\xe9on (1994)::Crime|Drama\n",
    },
    "10m": {
        "ratings.dat": "196::242::3.5::881250949\n196::302::3::881250948\n196::377::0.5::878887116\n",
        "movies.dat": "242::Kolya (1996)::Comedy\n302::L\xe9on (1994)::Crime|Drama\n",
    },
    "32m": {
        "ratings.csv": "userId,movieId,rating,timestamp\n196,242,3.5,881250949\n196,302,3.0,881250948\n196,377,1.0,878887116\n",
        "movies.csv": 'movieId,title,genres\n242,Kolya (1996),Comedy\n302,"L\xe9on (1994)",Crime|Drama\n377,"a, b",(no genres listed)\n',
    },
}


@pytest.mark.parametrize("size", MOVIELENS)
def test_movielens(tmp_path, size):
    for name, text in MOVIELENS[size].items():
        (tmp_path / name).write_text(
            text, encoding="latin-1" if size in ("100k", "1m") else "utf-8"
        )
    _, histories, titles, texts = load(tmp_path, "movielens", tmp_path)
    assert histories == {"196": ["377", "302", "242"]}
    assert (
        titles["242"] == "Kolya (1996)"
        and titles["302"] == "L\xe9on (1994)"
        and titles["377"] == ("a, b" if size == "32m" else "")
    )
    assert texts["242"] == "Comedy" and texts["302"] == "Crime Drama" and texts["377"] == ""


def test_movielens_errors(tmp_path):
    with pytest.raises(
        UserError, match="expected a MovieLens folder with one of ratings.csv, ratings.dat, u.data"
    ):
        load(tmp_path, "movielens", tmp_path)
    (tmp_path / "ratings.dat").write_text("196::242::3::881250949\n196::302::3\n")
    with pytest.raises(UserError, match=r"ratings\.dat: line 2: malformed row"):
        load(tmp_path, "movielens", tmp_path)


def test_s3rec_and_sasrec_text(tmp_path):
    path = tmp_path / "Beauty.txt"
    path.write_text("1 11 12 13 14\n2 12 11 13\n\n10 14 13  12\r\n")
    assert load(tmp_path, "sequences", path)[1] == {
        "1": ["11", "12", "13", "14"],
        "2": ["12", "11", "13"],
        "10": ["14", "13", "12"],
    }
    path.write_text("1 11\n1 12\n2 12\n1 13\n2 11\n2 13")
    assert load(tmp_path, "sequences", path)[1] == {
        "1": ["11", "12", "13"],
        "2": ["12", "11", "13"],
    }
    path.write_text("1 11 12 13\n2\n")
    with pytest.raises(
        UserError, match=r"Beauty\.txt: line 2: 1 fields, expected a user and its items"
    ):
        load(tmp_path, "sequences", path)
    path.write_bytes(b"1 11\n1 12\n1 13\n1 14 15\n1 \xff\n")
    manifest, histories, _, _ = load(tmp_path, "sequences", path, max_bad_rows=2)
    assert histories == {"1": ["11", "12", "13"]} and manifest["read"]["bad_rows"] == 2
    assert [
        json.loads(line)["line"]
        for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    ] == [5, 4]


@pytest.mark.parametrize(
    "text", ["1 11 12 13\n2 12 11 13\n", "1 11\n1 12\n1 13\n2 12\n2 11\n2 13\n"]
)
def test_a_byte_order_mark_is_no_part_of_the_first_user(tmp_path, text):
    path = tmp_path / "Beauty.txt"
    path.write_text("\ufeff" + text)
    assert load(tmp_path, "sequences", path)[1] == {
        "1": ["11", "12", "13"],
        "2": ["12", "11", "13"],
    }


MINIONEREC = (
    "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid\n"
)
MINIONEREC_ROWS = {
    "train": [
        "A1,\"['Glue', 'Tape, wide']\",Drill,\"[7, 3]\",12,\"['<a_1><b_2>', '<a_1><b_3>']\",<a_2><b_2>",
        "A2,\"['Drill']\",Glue,[12],7,\"['<a_2><b_2>']\",<a_1><b_2>",
        'A1,"[\'Glue\', \'Tape, wide\', \'Drill\']","Nail ""big""","[7, 3, 12]",4,x,y',
    ],
    "valid": ['A2,"[\'Drill\', \'Glue\']","Tape, wide","[12, 7]",3,x,y'],
    "test": ["A1,\"['Glue', 'Tape, wide', 'Drill', 'Nail']\",Saw,\"[7, 3, 12, 4]\",5,x,y"],
}


def write_minionerec(folder, rows):
    for split, lines in rows.items():
        (folder / split).mkdir(exist_ok=True)
        (folder / split / "Tools_5_2016-10-2018-11.csv").write_text(
            MINIONEREC + "\n".join(lines) + "\n"
        )


def test_minionerec(tmp_path):
    write_minionerec(tmp_path, MINIONEREC_ROWS)
    manifest, histories, titles, _ = load(tmp_path, "minionerec", tmp_path)
    assert histories == {"A1": ["7", "3", "12", "4", "5"], "A2": ["12", "7", "3"]}
    assert sorted(manifest["inputs"]) == [
        f"{split}/Tools_5_2016-10-2018-11.csv" for split in ("test", "train", "valid")
    ]
    assert titles == {"3": "Tape, wide", "4": 'Nail "big"', "5": "Saw", "7": "Glue", "12": "Drill"}
    write_minionerec(tmp_path, {**MINIONEREC_ROWS, "test": ["A1,[],Saw,none,5,x,y"]})
    with pytest.raises(
        UserError,
        match=r"Tools_5_2016-10-2018-11\.csv: line 2: expected user_id, item_id and a history such as \[3, 14\], found history 'none'",
    ):
        load(tmp_path, "minionerec", tmp_path / "train" / "Tools_5_2016-10-2018-11.csv")


def test_minionerec_histories_that_are_empty_or_of_ids_with_blanks(tmp_path):
    rows = {
        "train": [
            "A1,[],Drill,[],12,x,y",
            "A1,\"['Drill']\",Glue,['12'],a b,x,y",
            "A2,\"['Glue', 'Saw']\",Drill,\"[ 'a b' ,  5 ]\",12,x,y",
        ],
        "valid": ["A1,x,Saw,x,5,x,y".replace(",x,5", ",[12],5"), "A3,[],Saw,[ ],5,x,y"],
        "test": ["A3,x,Glue,[5],a b,x,y", "A3,x,Drill,[5],12,x,y"],
    }
    write_minionerec(tmp_path, rows)
    assert load(tmp_path, "minionerec", tmp_path)[1] == {
        "A1": ["12", "a b", "5"],
        "A2": ["a b", "5", "12"],
        "A3": ["5", "a b", "12"],
    }


@pytest.mark.parametrize(
    "bad",
    [
        "A1,x,y,[7 3],12,z,z",
        "A1,x,y,\"['a, b']\",12,z,z",
        'A1,x,y,"[7,]",12,z,z',
        "A1,x,y",
        "A1,x,y,[7],12,z,z,z",
        "A1,[],Saw,none,5,x,y",
    ],
)
def test_minionerec_rows_that_are_tolerated_are_tolerated_for_titles_too(tmp_path, bad):
    write_minionerec(
        tmp_path,
        {
            **MINIONEREC_ROWS,
            "train": [MINIONEREC_ROWS["train"][0], bad, *MINIONEREC_ROWS["train"][1:]],
        },
    )
    with pytest.raises(
        UserError, match=r"Tools_5_2016-10-2018-11\.csv: line 3: .* --max-bad-rows N"
    ):
        load(tmp_path, "minionerec", tmp_path)
    manifest, histories, titles, _ = load(tmp_path, "minionerec", tmp_path, max_bad_rows=1)
    assert manifest["read"]["bad_rows"] == 1 and histories == {
        "A1": ["7", "3", "12", "4", "5"],
        "A2": ["12", "7", "3"],
    }
    assert titles == {"3": "Tape, wide", "4": 'Nail "big"', "5": "Saw", "7": "Glue", "12": "Drill"}


def _toy(tmp_path):
    (tmp_path / "rows.csv").write_text(
        "user,item,timestamp\n"
        + "".join(
            f"u{user},{item},{(item * 7 + user) % 5}\n" for user in range(3) for item in range(4)
        )
    )
    (tmp_path / "items.csv").write_text(
        'item,title,text\n0,"A ""quoted"" title","tab\tinside"\n1,Plain,\n'
    )
    config = DataConfig(
        format="csv",
        path=str(tmp_path / "rows.csv"),
        items_path=str(tmp_path / "items.csv"),
        min_user_interactions=1,
        min_item_interactions=1,
    )
    prepare(config, tmp_path / "prepared")
    return load_dataset(tmp_path / "prepared")


@pytest.mark.parametrize("form", ["lcrec", "recbole"])
def test_exports_read_back_as_the_same_interactions(tmp_path, form):
    before = _toy(tmp_path)
    files = export_data(tmp_path / "prepared", form, tmp_path / "exported", "Toy")
    assert files == (
        ["Toy.inter.json", "Toy.item.json"] if form == "lcrec" else ["Toy.inter", "Toy.item"]
    )
    load(tmp_path, form, tmp_path / "exported")
    after = load_dataset(tmp_path / "out")
    assert (after.items == before.items).all() and (after.offsets == before.offsets).all()
    assert list(after.user_ids) == list(before.user_ids) and list(after.item_ids) == list(
        before.item_ids
    )
    assert list(after.titles) == list(before.titles) == ['A "quoted" title', "Plain", "", ""]
    assert after.texts[0] == ("tab\tinside" if form == "lcrec" else "tab inside")
    with pytest.raises(UserError, match="expected one of lcrec, recbole"):
        export_data(tmp_path / "prepared", "csv", tmp_path / "x", "Toy")


def _titled(tmp_path, titles):
    """InteractionDataset data of a user who takes one item of each title, in turn."""
    with open(tmp_path / "items.csv", "w", newline="") as file:
        csv.writer(file).writerows([("item", "title"), *enumerate(titles)])
    (tmp_path / "rows.csv").write_text(
        "user,item,timestamp\n" + "".join(f"u,{item},{item}\n" for item in range(len(titles)))
    )
    config = DataConfig(
        format="csv",
        path=str(tmp_path / "rows.csv"),
        items_path=str(tmp_path / "items.csv"),
        min_user_interactions=1,
        min_item_interactions=1,
    )
    prepare(config, tmp_path / "prepared")


def test_a_recbole_export_has_every_item_once_whatever_its_title(tmp_path):
    titles = [f"Cable {item} m" for item in range(5000)]
    titles[3000] = 'Monitor 27" with stand'
    titles[4000] = '"Weird Al" on vinyl'
    titles[4001] = '"Heroes'
    _titled(tmp_path, titles)
    export_data(tmp_path / "prepared", "recbole", tmp_path / "exported", "Shop")
    rows = [
        line.split("\t") for line in (tmp_path / "exported" / "Shop.item").read_text().splitlines()
    ]
    assert [row[0] for row in rows[1:]] == [str(item) for item in range(5000)]
    assert [rows[1 + item][1] for item in (3000, 4000, 4001)] == [
        'Monitor 27" with stand',
        "'Weird Al' on vinyl",
        "'Heroes",
    ]
    with open(tmp_path / "exported" / "Shop.item", newline="") as file:
        assert list(csv.reader(file, delimiter="\t")) == rows, "as readers see it that know quotes"


@pytest.mark.parametrize("user", ["a\tb", '"a'])
def test_ids_that_recbole_files_cannot_hold_are_refused(tmp_path, user):
    table = pa.table({"user": [user] * 3, "item": ["x", "y", "z"], "timestamp": [1, 2, 3]})
    pq.write_table(table, tmp_path / "rows.parquet")
    prepare(
        DataConfig(
            format="parquet",
            path=str(tmp_path / "rows.parquet"),
            min_user_interactions=1,
            min_item_interactions=1,
        ),
        tmp_path / "prepared",
    )
    with pytest.raises(UserError, match="RecBole's files cannot hold ids"):
        export_data(tmp_path / "prepared", "recbole", tmp_path / "exported", "Shop")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("ids", [("NA", "x"), ("u", "null"), ("u", "nan"), ("None", "x")])
def test_ids_that_pandas_takes_for_missing_values_are_refused(tmp_path, ids):
    user, item = ids
    pq.write_table(
        pa.table({"user": [user] * 3, "item": [item, "y", "NA-1"], "timestamp": [1, 2, 3]}),
        tmp_path / "rows.parquet",
    )
    prepare(
        DataConfig(
            format="parquet",
            path=str(tmp_path / "rows.parquet"),
            min_user_interactions=1,
            min_item_interactions=1,
        ),
        tmp_path / "prepared",
    )
    what = f"user '{user}'" if item == "x" else f"item '{item}'"
    with pytest.raises(
        UserError,
        match=f"^{what}: pandas, which RecBole reads with, takes this id for a missing value",
    ):
        export_data(tmp_path / "prepared", "recbole", tmp_path / "exported", "Shop")
    assert not (tmp_path / "exported").exists()
    assert export_data(tmp_path / "prepared", "lcrec", tmp_path / "exported", "Shop") == [
        "Shop.inter.json",
        "Shop.item.json",
    ]


def test_lcrec_export_takes_the_index_along(tmp_path):
    _toy(tmp_path)
    build_index(ItemsConfig(form="atomic"), load_dataset(tmp_path / "prepared"), tmp_path / "items")
    files = export_data(
        tmp_path / "prepared", "lcrec", tmp_path / "exported", "Toy", tmp_path / "items/index.json"
    )
    assert files == ["Toy.index.json", "Toy.inter.json", "Toy.item.json"]
    assert (
        json.loads((tmp_path / "exported/Toy.index.json").read_text()).keys()
        == json.loads((tmp_path / "exported/Toy.item.json").read_text()).keys()
    )


def test_an_index_of_other_items_is_not_exported(tmp_path):
    dataset = _toy(tmp_path)
    build_index(
        ItemsConfig(form="atomic"),
        replace(dataset, item_ids=["0", "1", "2", "4"]),
        tmp_path / "items",
    )
    with pytest.raises(
        UserError,
        match="items: the index was made for other items than the run's prepared data holds; run `ilrec index` again",
    ):
        export_data(
            tmp_path / "prepared",
            "lcrec",
            tmp_path / "exported",
            "Toy",
            tmp_path / "items/index.json",
        )
    assert not (tmp_path / "exported").exists()
