import itertools

import pytest

from semiseg_jax.data import splits
from semiseg_jax.errors import UserError


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a.jpg m/a.png\nb.jpg m/b.png\n", [("a.jpg", "m/a.png"), ("b.jpg", "m/b.png")]),
        (b"a.jpg\tm/a.png\r\nb.jpg\tNone\r\n", [("a.jpg", "m/a.png"), ("b.jpg", None)]),
        (b"\xef\xbb\xbf/a.jpg /m/a.png  \n\n  b.jpg None", [("a.jpg", "m/a.png"), ("b.jpg", None)]),
        (b"2007_000733\n2007_000783", [("2007_000733", None), ("2007_000783", None)]),
        (b"my image.jpg\tmy mask.png\n", [("my image.jpg", "my mask.png")]),
    ],
    ids=[
        "spaces",
        "tabs and CR",
        "BOM, slashes, blanks, no newline",
        "bare ids",
        "blank in a name",
    ],
)
def test_formats(tmp_path, content, expected):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    assert [(e.image, e.mask) for e in splits.read_list(path)] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n", "is empty"), (b"a b\na b c\n", "line 2, has 3 columns"), (None, "is missing")],
)
def test_bad_lists_are_one_sentence(tmp_path, content, message):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        splits.read_list(path)


def test_draws_nest_and_are_of_the_size_asked_for():
    draws = [splits.draw(100, labels, seed=3) for labels in (2, 0.1, 50, 1.0, 0)]
    assert [len(d) for d in draws] == [2, 10, 50, 100, 100]
    for small, large in itertools.pairwise(draws):
        assert set(small) <= set(large)
    assert splits.draw(100, 10, seed=4) != draws[1]


@pytest.mark.parametrize("labels", [101, -1, 0.001])
def test_impossible_draws_are_refused(labels):
    with pytest.raises(UserError, match=r"data\.labels="):
        splits.draw(100, labels, seed=0)


def test_split_hash_names_the_parts_whatever_their_order():
    one = splits.split_hash([["a", "b"], ["c"]])
    assert one == splits.split_hash([["b", "a"], ["c"]])
    assert one != splits.split_hash([["a"], ["b", "c"]])
