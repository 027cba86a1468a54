"""What can be checked of a recipe without its data and its devices."""

import jax
from ml_collections import ConfigDict

from xception_flax import data
from xception_flax.training import program, sharding
from xception_flax.training.patience import Patience

# In place of the data's. Warm-up and length are in epochs, so that whether they fit hardly depends on it.
IMAGES = 1_000_000


def check_values(config: ConfigDict) -> None:
    """Puts together what a resolved recipe computes and traces its network: two seconds, and no arrays.

    It opens a device of JAX's default platform. Mistakes that only the data or the devices of a run can show stay.

    Raises:
      UserError: a value is out of its range, or values do not fit together.
    """
    data.check_options(**config.data)
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    made = program.create_program(config, mesh, program.image_shape(config), num_images=IMAGES)
    Patience(config.metrics.name, config.patience_metric, config.patience_epochs, made.length)
