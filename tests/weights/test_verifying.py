"""The comparison with another library: with Keras, live; it agrees where it should, and names the stage if not."""

import re
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import shell
from xception_flax.commands import convert
from xception_flax.text.errors import UserError
from xception_flax.weights import verifying, writing
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.shapes import shapes_of


@pytest.fixture(autouse=True, scope="module")
def keras_promotes_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def random_network(name: str, framework: str, image_size: int, **fields: object) -> Pretrained:
    """Random weights, by which the signal stays alive."""
    rng, values, model = np.random.default_rng(0), {}, dict(name=name, num_classes=5) | fields
    for place, leaf in sorted(flatten_dict(shapes_of(model, 3)).items()):
        if place[-1] == "kernel":
            depthwise = leaf.shape[-2] == 1
            fan_in = np.prod(leaf.shape[:2] if depthwise else leaf.shape[:-1])
            values[place] = rng.normal(0, fan_in**-0.5, leaf.shape)
        else:
            low, high = {"var": (0.3, 0.7), "scale": (0.9, 1.1)}.get(place[-1], (-0.1, 0.1))
            values[place] = rng.uniform(low, high, leaf.shape)
    variables = unflatten_dict({place: value.astype(np.float32) for place, value in values.items()})
    return Pretrained(framework, model, variables, 3, image_size=image_size)


STAGES = ["stage1", "stage2", "stage3", "stage4", "stage5", "pooled", "logits"]


@pytest.mark.parametrize(("name", "size"), [("xception", 75), ("inception_v3", 139)])
def test_it_agrees_with_keras(name, size):
    found = verifying.verify(random_network(name, "keras", size))
    print(found)
    assert found.against.startswith("Keras 3.")
    assert list(found.differences) == STAGES
    assert found.first is None
    assert 0 < max(found.differences.values()) < 5e-5  # float32


def test_the_first_stage_that_differs_is_named():
    """Another epsilon matters from the first normalization on, another padding from the first pooling on."""
    plain = random_network("xception", "keras", 78)  # 36 x 36 before the first pooling: of odd sizes both pad alike
    for fields, stage, values in [
        ({"bn_epsilon": 1e-2}, "stage1", "bn_epsilon 0.001 in place of 0.01"),
        ({"padding": "SYMMETRIC"}, "stage2", "padding SAME in place of SYMMETRIC"),
    ]:
        changed = plain._replace(model=plain.model | fields)
        found = verifying.verify(changed)
        print(fields, found)
        assert found.first == stage
        assert values in verifying.reason(changed, stage)
    assert verifying.reason(plain, "stage1").startswith("the order of the channels")
    # Arrays in each other's place are none of the reasons: both networks have them so.
    assert verifying.reason(plain, "stage3").endswith("or pooling, or a layer that only one of them has")


def test_arrays_in_each_others_place_are_not_seen():
    """As the page says: the library's network is built of the arrays as they were read."""
    plain = random_network("xception", "keras", 75)
    params = plain.variables["params"]
    layers = [f"block{i}_sepconv1" for i in (5, 6)]
    swapped = params | {layer: params[other] for layer, other in zip(layers, layers[::-1], strict=True)}
    found = verifying.verify(plain._replace(variables=plain.variables | {"params": swapped}))
    assert found.first is None
    assert max(found.differences.values()) < 5e-5


def test_differences_by_hand():
    theirs = np.array([[0.0, 1.0], [4.0, 1.0]])
    assert verifying.difference(theirs + 0.5, theirs) == 0.5 / 4
    assert verifying.difference(theirs[:, :1], theirs) == np.inf
    unknown = verifying.Verification("", {"stage1": 1e-5, "stage2": float("nan"), "logits": 1.0})
    assert unknown.first == "stage2"


def test_what_cannot_be_compared_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(UserError, match=r"^this needs Keras, which cannot be imported: .*; pip install keras$"):
        verifying.verify(random_network("xception", "keras", 71))
    monkeypatch.setitem(sys.modules, "timm", None)
    for framework, fields, message in [
        ("deeplab", {}, "timm computes what is compared, and cannot be imported: .*; pip install timm$"),
        ("timm", {"width": 0.1, "middle_repeats": 1}, "timm has no xception41 of these widths and depths; nothing was"),
        ("xception_flax", {}, re.escape("these weights are from xception_flax, which nothing compares with")),
    ]:
        with pytest.raises(UserError, match=message):
            verifying.verify(random_network("xception41", framework, 64, **fields))


def test_the_command_prints_a_table(tmp_path, monkeypatch, capsys):
    """Where the networks differ it says so, and writes nothing."""
    plain = random_network("xception", "keras", 78)
    for name, fields, code, said in [
        ("plain", {}, 0, r"agree +yes, to 1e-04\n"),
        (
            "other",
            {"bn_epsilon": 1e-2},
            1,
            r"agree +not from stage1 on\n +maybe +the library .* bn_epsilon 0\.001 in pl",
        ),
    ]:
        file = writing.write(plain._replace(model=plain.model | fields), tmp_path / f"{name}.npz").path
        options = ("--verify", "--output", tmp_path / f"{name}.safetensors")
        found, out, _ = shell.call(monkeypatch, capsys, convert.main, file, *options)
        assert found == code
        assert re.search(
            rf"{name}\.npz and Keras 3\..*\n +stage1 +[0-9.]+e-0[0-9] of the spread\n(?s:.*){said}", out
        ), out
        assert (tmp_path / f"{name}.safetensors").exists() is (code == 0)
    found, _, err = shell.call(monkeypatch, capsys, convert.main, tmp_path / "plain.npz")
    assert found == 2
    assert "expected --output, --verify, or both" in err
