"""RecBole, MovieLens, sequences and MiniOneRec on samples as their publishers write
them.
"""

from __future__ import annotations

import json

import pytest

from ilrec_dist.common.errors import UserError
from tests.support.loading import load

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
            match=r"ml\.item: line 7: malformed row: 2 fields, expected 4 \('\\t'-separated\); "
            r"mend it: items are not skipped$",
        ):
            load(tmp_path, "recbole", tmp_path, max_bad_rows=allowed)


def test_recbole_items_without_a_text(tmp_path):
    (tmp_path / "ml.inter").write_text(RECBOLE_INTER)
    (tmp_path / "ml.item").write_text(
        "item_id:token\tyear:token\tname:token\tclass:token_seq\n"
        "242\t\tA\t\n302\t1997\tB\t\n377\t\t\tComedy  Crime\n51\t1990\tC\tDrama\n"
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
        "ratings.dat": "196::242::3.5::881250949\n196::302::3::881250948\n"
        "196::377::0.5::878887116\n",
        "movies.dat": "242::Kolya (1996)::Comedy\n302::L\xe9on (1994)::Crime|Drama\n",
    },
    "32m": {
        "ratings.csv": "userId,movieId,rating,timestamp\n"
        "196,242,3.5,881250949\n196,302,3.0,881250948\n196,377,1.0,878887116\n",
        "movies.csv": "movieId,title,genres\n242,Kolya (1996),Comedy\n"
        '302,"L\xe9on (1994)",Crime|Drama\n377,"a, b",(no genres listed)\n',
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
        "A1,\"['Glue', 'Tape, wide']\",Drill,\"[7, 3]\",12,"
        "\"['<a_1><b_2>', '<a_1><b_3>']\",<a_2><b_2>",
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
        match=r"Tools_5_2016-10-2018-11\.csv: line 2: expected user_id, item_id and a history "
        r"such as \[3, 14\], found history 'none'",
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
