"""Messages about names."""

import pytest

from xception_flax.text import lookup
from xception_flax.text.errors import UserError


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        ("tset", ("train", "test"), "unknown split 'tset'; did you mean 'test'? There are: test, train."),
        ("x", ("train", "test"), "unknown split 'x'; there are: test, train."),
        ("x", (), "unknown split 'x'; there are: none."),
        ("trian", ["train", *map(str, range(30))], "unknown split 'trian'; did you mean 'train'?"),
        ("x", [f"n{i}" for i in range(31)], "unknown split 'x'; there are 31, and none is like it."),
        ("x" * 200, ("train",), f"unknown split '{'x' * 59} ... {'x' * 29}'; there are: train."),
    ],
)
def test_a_name_that_is_not_there(name, names, message):
    with pytest.raises(UserError) as raised:
        lookup.lookup(dict.fromkeys(names), name, "split")
    assert str(raised.value) == message


def test_what_differs_between_rows():
    assert lookup.differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}]) == ["b", "c"]
    assert lookup.differing([{"a": 1}, {"a": 1}]) == []
