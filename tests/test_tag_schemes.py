"""Entity tags of three schemes become BIO; what a scheme does not allow is mended and counted."""

from __future__ import annotations

import pytest

from bert_ds.basics.ranks import DataError
from bert_ds.downstream.rows.tag_schemes import to_bio


@pytest.mark.parametrize(
    ("scheme", "tags", "bio", "mended"),
    [
        ("bio", "B-A I-A O B-A B-A", "B-A I-A O B-A B-A", 0),
        ("bio", "I-A I-A O I-B", "B-A I-A O B-B", 2),
        ("bio", "B-A I-B I-B", "B-A B-B I-B", 1),
        ("iob1", "I-A I-A B-A O I-B", "B-A I-A B-A O B-B", 0),
        ("iob1", "I-A I-B", "B-A B-B", 0),
        ("iob1", "O B-A I-A", "O B-A I-A", 1),
        ("bioes", "B-A I-A E-A S-B O", "B-A I-A I-A B-B O", 0),
        ("bioes", "S-A S-A", "B-A B-A", 0),
        ("bioes", "B-A O E-A", "B-A O B-A", 2),
        ("bioes", "B-A I-A", "B-A I-A", 1),
        ("bioes", "S-A I-A", "B-A B-A", 2),
    ],
)
def test_tags_become_bio(scheme: str, tags: str, bio: str, mended: int) -> None:
    assert to_bio(tags.split(), scheme, where="x:1") == (tuple(bio.split()), mended)


def test_a_tag_of_another_scheme_is_named() -> None:
    with pytest.raises(DataError, match=r'x:7: found the tag "S-A", wanted O, B-TYPE, I-TYPE \(bio\)'):
        to_bio(["O", "S-A"], "bio", where="x:7")
