"""Files that a user names."""

import pytest

from xception_flax.host import files
from xception_flax.text.errors import UserError


def test_a_check_changes_nothing(tmp_path):
    (tmp_path / "old").write_text("x")
    (tmp_path / "link").symlink_to("target")
    for name in ("old", "new", "link"):
        files.check_writable(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old"]
    assert (tmp_path / "old").read_text() == "x"
    assert (tmp_path / "link").is_symlink()


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "no" / "file", "No such file or directory")):
        with pytest.raises(UserError, match=f"^{path} cannot be written: {reason}; name another file\\.$"):
            files.check_writable(path)
