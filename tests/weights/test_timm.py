"""Aligned Xception, and torch's Xception and Inception V3, against what timm computed (golden/make_timm.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from golden.seeded import disturbed, draw, sample, structured_images
from xception_flax import create_model
from xception_flax.text.errors import UserError
from xception_flax.weights import timm

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "timm.npz")

# As for Keras: a difference counts only against what an image changes.
MIN_SPREAD = 0.05  # of the largest value, over images
MAX_DIFFERENCE = 2e-4  # of that spread


def shapes_of(model) -> dict:
    images = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    return dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images))


def seeded_state(template: dict) -> dict[str, np.ndarray]:
    """timm's state_dict as golden/make_timm.py fills it, the statistics still zero."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
    state = timm.to_timm(zeros)
    for path, name in timm.timm_names(template).items():
        if path[0] == "params":
            shape = state[name].shape
            state[name] = draw(name, path[-1], shape, int(np.prod(shape[1:])))
    return state


def calibrated(model, template: dict, images: np.ndarray) -> dict:
    """Seeded weights with the statistics of these images, moved as golden/make_timm.py moves them."""
    variables = timm.from_timm(seeded_state(template), template)
    # With a decay of 0 one pass in training leaves the statistics of the batch itself.
    training = model.clone(bn_decay=0.0, dropout_rate=0.0)
    _, updates = jax.jit(lambda v, x: training.apply(v, x, train=True, mutable="batch_stats"))(variables, images)
    names = timm.timm_names(template)
    statistics = {
        path[1:]: disturbed(names[path], path[-1], np.asarray(value))
        for path, value in flatten_dict({"batch_stats": updates["batch_stats"]}).items()
    }
    return {"params": variables["params"], "batch_stats": unflatten_dict(statistics)}


def compare(ours: np.ndarray, theirs: np.ndarray, what: str) -> float:
    spread = np.ptp(theirs, axis=0).max()
    assert spread >= MIN_SPREAD * np.abs(theirs).max(), what
    difference = np.abs(ours - theirs).max() / spread
    assert difference <= MAX_DIFFERENCE, what
    return difference


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, (299, 299)) for name in timm.NETWORKS),  # and of those of another depth only this
        *((name, (150, 214)) for name in ("legacy_xception", "inception_v3", "xception41", "xception41p")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}x{value[1]}",
)
def test_logits_and_features_equal_timms(name, size):
    key = f"{name}/{size[0]}x{size[1]}"
    auxiliary = {"auxiliary": True} if f"{key}/auxiliary_logits" in GOLDEN else {}
    model = create_model(**timm.NETWORKS[name], **auxiliary)
    images = structured_images(4, *size)
    variables = calibrated(model, shapes_of(model), images)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False, method="endpoints"))
    endpoints = {key: np.asarray(value) for key, value in apply(variables, images).items()}

    for logits in ("logits", *(f"{name}_logits" for name in auxiliary)):
        print(key, logits, compare(endpoints[logits], GOLDEN[f"{key}/{logits}"], logits))
    for stage, stride in model.strides.items():
        assert endpoints[stage].shape == tuple(GOLDEN[f"{key}/{stage}/shape"]), stage
        assert endpoints[stage].shape[1] == pytest.approx(size[0] / stride, abs=5), stage  # borders may be lost
        compare(sample(endpoints[stage]), GOLDEN[f"{key}/{stage}"], stage)


@pytest.mark.parametrize("name", timm.NETWORKS)
def test_parameter_counts_equal_timms(name):
    shapes = shapes_of(create_model(**timm.NETWORKS[name]))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == GOLDEN[f"{name}/parameters"]


@pytest.mark.parametrize("name", ["legacy_xception", "inception_v3", "xception41", "xception41p"])
def test_conversion_there_and_back(name):
    template = shapes_of(create_model(**timm.NETWORKS[name], width=0.1))
    variables = timm.from_timm(seeded_state(template), template)
    state = timm.to_timm(variables)
    if name == "legacy_xception":  # as torch has them: [features, channels / groups, rows, columns]
        assert state["conv1.weight"].shape == (8, 3, 3, 3)
        assert state["block1.rep.0.conv1.weight"].shape == (8, 1, 3, 3)
    elif name == "inception_v3":
        assert state["Mixed_6b.branch7x7_2.conv.weight"].shape[2:] == (1, 7)
        assert state["Mixed_6b.branch7x7_3.conv.weight"].shape[2:] == (7, 1)
    else:
        assert state["stem.0.conv.weight"].shape == (8, 3, 3, 3)
        assert state["blocks.0.stack.conv1.conv_dw.weight"].shape == (8, 1, 3, 3)
    again = timm.from_timm(state, template)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_what_does_not_match_is_refused():
    template = shapes_of(create_model("xception41", width=0.1, middle_repeats=1))
    state = seeded_state(template)
    with pytest.raises(UserError, match=r"the timm model has no 'head.fc.bias' for params/predictions/bias"):
        timm.from_timm({n: a for n, a in state.items() if n != "head.fc.bias"}, template)
    with pytest.raises(UserError, match=r"our network has no place for blocks.99.norm.weight of the timm model"):
        timm.from_timm(state | {"blocks.99.norm.weight": np.zeros(1)}, template)
    with pytest.raises(UserError, match=r"'stem.0.bn.bias' of the timm model: .* must have shape \(8,\), got \(9,\)"):
        timm.from_timm(state | {"stem.0.bn.bias": np.zeros(9)}, template)
    with pytest.raises(UserError, match="legacy_xception has 8 blocks in its middle flow"):
        timm.timm_names(shapes_of(create_model("xception", width=0.1, middle_repeats=1)))
    with pytest.raises(UserError, match="timm's networks have no layer like 'conv1'"):
        timm.timm_names(shapes_of(create_model("lenet")))
    counted = state | {"stem.0.bn.num_batches_tracked": np.zeros((), np.int64)}
    timm.from_timm(counted, template)
