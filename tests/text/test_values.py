"""Values as text, their types, and the descriptions of types."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from xception_flax.text import values
from xception_flax.text.errors import UserError
from xception_flax.text.sizes import ImageSize
from xception_flax.text.values import Endless

LARGEST = 2.0**128 - 2.0**104  # of float32


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("3", int, 3),
        ("1_000", int, 1000),
        ("3", float, 3),
        ("-0.0", float, 0.0),
        ("true", bool, True),
        ("False", bool, False),
        ("none", int | None, None),
        ("None", str | None, None),
        ("a text", str, "a text"),
        ("'quoted'", str, "quoted"),
        ("7", str, "7"),
        ("", str, ""),
        ("[8, 2.5]", Sequence[float], (8, 2.5)),
        ("[[1, 2], (3, 4)]", Sequence[Sequence[int]], ((1, 2), (3, 4))),
        ("bfloat16", DTypeLike, "bfloat16"),
        ("inf", Endless, LARGEST),
        ("2.5", Endless, 2.5),
        ("299", ImageSize, 299),
        ("224x320", ImageSize, (224, 320)),
        ("'224x320'", ImageSize, (224, 320)),
        ("(224, 320)", ImageSize, (224, 320)),
        ("[320, 224]", ImageSize, (320, 224)),
        ("299x299", ImageSize, 299),
        ("0x64", ImageSize, (0, 64)),  # not the number 100; its range is for `check_size`
        ("(299, 299)", ImageSize, 299),
    ],
)
def test_a_text_is_read_by_the_type(text, annotation, value):
    found = values.parse("key", text, annotation)
    assert found == value
    assert type(found) is type(value)
    assert math.copysign(1, found or 0) == 1 if annotation is float else True
    assert values.parse("key", values.as_text(found, annotation), annotation) == found


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (True, int, r"^key must be an integer, got True\.$"),
        (2.0, int, r"^key must be an integer, got 2\.0\.$"),
        (1, bool, r"^key must be True or False, got 1\.$"),
        (None, DTypeLike, r"^key must be a data type, got None\.$"),
        ("ab", Sequence[str], r"^key must be a list of texts, got 'ab'\.$"),
        (range(3), Sequence[int], r"^key must be a list of integers, got range\(0, 3\)\.$"),
        ((1, True), Sequence[float], r"^key must be a list of numbers, got \(1, True\)\.$"),
        (((1,), 2), Sequence[Sequence[int]], r"^key must be a list of lists of integers, got \(\(1,\), 2\)\.$"),
        ("x", float | None, r"^key must be a number or None, got 'x'\.$"),
        ("x", Endless, r"^key must be a number or inf, got 'x'\.$"),
        (-math.inf, Endless, r"^key must be a finite number, got -inf\.$"),
        (math.inf, float, r"^key must be a finite number, got inf\.$"),
        (2**63, int, r"^key must be an integer of 64 bits, got 9223372036854775808\.$"),
        ((0.0, 1e39), Sequence[float], r"^key must be at most 3\.4e\+38, float32's largest number, got 1e\+39\.$"),
        (True, ImageSize, r"^key must be a number, or height x width such as 224x320, got True\.$"),
        ((224,), ImageSize, r"^key must be a number, or height x width such as 224x320, got \(224,\)\.$"),
        ((1, 2, 3), ImageSize, r"^key must be a number, or height x width .*, got \(1, 2, 3\)\.$"),
        ((1.0, 2), ImageSize, r"^key must be a number, or height x width .*, got \(1\.0, 2\)\.$"),
        ("224*320", ImageSize, r"^key must be a number, or height x width .*, got '224\*320'\.$"),
        ("224X320", ImageSize, r"^key must be a number, or height x width .*, got '224X320'\.$"),
        ("-1x320", ImageSize, r"^key must be a number, or height x width .*, got '-1x320'\.$"),
        ("x" * 4097, str, r"^key must be a text of at most 4,096 characters, none of them NUL, got 'x{59} "),
    ],
)
def test_a_value_of_another_type_is_refused(value, annotation, message):
    with pytest.raises(UserError, match=message):
        values.check("key", value, annotation)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype("bfloat16"), "bfloat16"], ids=repr)
def test_a_data_type_is_kept_by_its_name(dtype):
    """JSON can store it."""
    assert values.check("key", dtype, DTypeLike) == "bfloat16"


def test_a_text_that_reads_as_another_value_is_quoted():
    assert values.as_text("None", str | None) == "'None'"
    assert values.as_text("none at all", str | None) == "none at all"
    assert values.as_text("7", str) == "7"


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=r"<class 'dict'> is no type of a value that a user can write\.$"):
        values.describe(dict)
