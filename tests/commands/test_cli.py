"""What is a user's mistake and what is a defect."""

import errno
import os
import sys

import numpy as np
import pytest

from shell import call as run
from xception_flax.commands import cli
from xception_flax.display import console
from xception_flax.models import ops


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
