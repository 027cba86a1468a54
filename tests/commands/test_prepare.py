"""The command `prepare`; tests/prepare/ has the tests of what it does."""

import pytest

from xception_flax.commands import prepare


def test_help_is_worth_reading(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    out = capsys.readouterr().out
    for word in ("imagenet", "folder", "check", "examples:"):
        assert word in out
