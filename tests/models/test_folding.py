"""Folded batch normalization: the same network, to rounding, at every endpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.models.test_models import NARROW, random_variables
from xception_flax import create_model, fold_batch_norm
from xception_flax.text.errors import UserError

# With pre-activation the first normalization of a block takes a sum (in the first block the stem's
# result), and the one before a strided convolution takes an endpoint.
PREACTIVATED = {f"block{i}_sepconv1_bn" for i in (3, 4, 5, 6, 7)} | {f"block{i}_sepconv3_bn" for i in (2, 3, 4, 6)}
UNFOLDED = {"xception41p": PREACTIVATED, "xception65p": PREACTIVATED}


@pytest.mark.parametrize("name", sorted(set(NARROW) - {"lenet"}))
def test_folding_changes_no_endpoint(name):
    """float32, random weights and statistics: within 1e-5 of the largest value of each endpoint."""
    model = create_model(name, num_classes=7, **NARROW[name])
    images = jax.random.normal(jax.random.key(0), (2, 75, 80, 3))
    variables = random_variables(model, images)
    folded = fold_batch_norm(model, variables)
    apply = jax.jit(lambda v: model.apply(v, images, train=False, method="endpoints"))
    expected, found = apply(variables), apply(folded)
    for endpoint, value in expected.items():
        np.testing.assert_allclose(found[endpoint], value, atol=1e-5 * np.abs(value).max(), rtol=0, err_msg=endpoint)

    before, after = flatten_dict(variables), flatten_dict(folded)
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {k: (v.shape, v.dtype) for k, v in before.items()}
    unfolded = {path[-2] for path, value in after.items() if path[-1] == "mean" and np.any(value)}
    assert unfolded == UNFOLDED.get(name, set())


@pytest.mark.parametrize("name", ["xception", "inception_v3", "xception41p"])
def test_the_channels_are_those_of_the_weights(name):
    """Gray images: nothing is to be said."""
    model = create_model(name, num_classes=7, **NARROW[name])
    variables = random_variables(model, jnp.zeros((1, 75, 75, 1)))
    expected = fold_batch_norm(model, variables, image_shape=(75, 75, 1))
    jax.tree.map(np.testing.assert_array_equal, fold_batch_norm(model, variables), expected)


def test_folding_in_blocks_that_are_rematerialised():
    variables = random_variables(
        create_model("xception", num_classes=7, **NARROW["xception"]), jnp.zeros((1, 75, 75, 3))
    )
    plain, remat = (
        fold_batch_norm(create_model("xception", num_classes=7, remat=r, **NARROW["xception"]), variables)
        for r in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, remat)


def test_a_network_without_statistics_is_refused():
    model = create_model("lenet", **NARROW["lenet"])
    with pytest.raises(UserError, match="needs variables with 'batch_stats'"):
        fold_batch_norm(model, random_variables(model, jnp.zeros((1, 75, 75, 3))))
