"""Machines by their names, of TPUs and of GPUs."""

import pytest

from xception_flax.planning import gpus, machines, tpus
from xception_flax.text.errors import UserError


def test_names_of_both() -> None:
    assert isinstance(machines.parse_machine("v5e:2x4"), tpus.Slice)
    assert isinstance(machines.parse_machine("h100:8"), gpus.Hosts)
    assert not set(tpus.CHIPS) & set(gpus.GPUS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5:2x4", "unknown TPU or GPU 'v5' .* did you mean 'v5p' or 'v5e'"),
        ("h10:8", "unknown TPU or GPU 'h10' .* did you mean 'h100'"),
        ("H100", "There are: a100, b200, h100, h200, l4, v4, v5e, v5p, v6e. As in v5e:2x4, h100:8.$"),
        ("", "unknown TPU or GPU ''"),
        ("v5e", "no slice"),
        ("h100:9", "no hosts"),
    ],
)
def test_no_machines(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        machines.parse_machine(name)
    assert len(str(caught.value).splitlines()) == 1
