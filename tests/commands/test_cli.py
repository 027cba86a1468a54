"""What is a user's mistake and what is a defect."""

import errno
import os
import sys

import numpy as np
import pytest

from shell import call as run
from xception_flax.commands import cli, images
from xception_flax.display import console
from xception_flax.models import ops
from xception_flax.text.errors import UserError


@pytest.mark.parametrize("defect", [lambda: int("x"), lambda: ops.max_pool(np.ones(3)), lambda: console.percent("x")])
def test_a_defect_keeps_its_traceback(monkeypatch, defect):
    """A ValueError of a library, or of Python inside our own functions, is no user's mistake."""
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises((ValueError, TypeError)):
        cli.run(lambda argv: defect())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_what_a_disk_refuses_is_no_defect(monkeypatch, capsys, number):
    def refused(argv):
        raise OSError(number, os.strerror(number), "some/file")

    assert run(monkeypatch, capsys, refused) == (2, "", f"error: some/file: {os.strerror(number)}.\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("SOURCE a --json b", dict(json=True)),
        ("SOURCE --json a b", dict(json=True)),
        ("--json SOURCE --top 3 a b --batch-size=2", dict(json=True, top=3, batch_size=2)),
        ("SOURCE a --mean 1 2 3 b", dict(mean=[1.0, 2.0, 3.0])),
        ("--mean 127.5 --std -1 SOURCE a b", dict(mean=[127.5], std=[-1.0])),
        ("SOURCE --top 3 a b --config.data.x=1", dict(top=3, unknown=["--config.data.x=1"])),
        ("SOURCE --config.a=1 a --shots b --config.b=2", dict(unknown=["--shots", "--config.a=1", "--config.b=2"])),
        ("SOURCE a b --config.a 1", dict(unknown=["--config.a", "1"])),
        ("SOURCE --json a --top 3 -- b", dict(json=True, top=3)),
        ("SOURCE --json a -- -b", dict(json=True, images=["a", "-b"])),
        ("--std 1 -- SOURCE a b", dict(std=[1.0])),
    ],
)
def test_options_may_stand_between_images(words, said):
    parser = cli.parser("command", None, "", hosts=False)
    images.add_arguments(parser)
    parser.add_argument("--top", type=cli.positive)
    parser.add_argument("--json", action="store_true")
    usual, _ = parser.parse_known_args(["SOURCE", "a", "b"])
    arguments, unknown = parser.parse_known_args(words.split())
    found = vars(arguments) | {"images": [str(path) for path in arguments.images], "unknown": unknown}
    assert found == vars(usual) | {"images": ["a", "b"], "unknown": []} | said


def test_an_override_may_have_spaces_and_stand_between_positionals():
    parser = cli.parser("command", None, "", hosts=False)
    for name in ("source", "folder"):
        parser.add_argument(name, nargs="?")
    given = ["net", "--config.data.eval_transforms=a | b", "photos"]
    arguments, unknown = parser.parse_known_args(given)
    assert (arguments.source, arguments.folder, unknown) == ("net", "photos", given[1:2])


def test_a_value_of_a_wrong_type_is_still_refused():
    parser = cli.parser("command", None, "", hosts=False)
    images.add_arguments(parser)
    with pytest.raises(UserError, match="argument --mean: invalid float value: 'x'"):
        parser.parse_args(["SOURCE", "a", "--mean", "x"])
    with pytest.raises(UserError, match=r"argument --batch-size: must be a positive integer, got '0'"):
        parser.parse_args(["SOURCE", "--batch-size", "0", "a"])
    with pytest.raises(UserError, match=r"unrecognized arguments: --jsn;"):
        parser.parse_args(["SOURCE", "a", "--jsn", "b"])
    with pytest.raises(UserError, match=r"unknown option '--men'; did you mean '--mean'\? --help shows"):
        parser.parse_args(["SOURCE", "a", "--men", "1"])
