"""What must be installed. Like `signals` it imports very little: it runs before the imports that would fail."""

import importlib.util
import sys

from xception_flax.text.errors import UserError

# The dependencies of pyproject.toml, as they are imported, and those of its extra 'train' with what it includes.
LIBRARIES = (
    "jax", "flax", "optax", "orbax", "numpy", "ml_collections", "absl", "cv2", "h5py", "huggingface_hub", "packaging",
    "PIL", "pooch", "rich", "safetensors", "scipy", "simplejpeg",
)  # fmt: skip
TRAINING = (
    "grain", "array_record", "imagehash", "importlib_resources", "matplotlib", "pyarrow", "sklearn", "tensorboardX",
    "tensorflow_datasets",
)  # fmt: skip


def missing_of(names: tuple[str, ...]) -> list[str]:
    """Returns those of `names`, as they are imported, that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def check_libraries(*, training: bool) -> None:
    """Ends the process with code 2 and a line on standard error if a library is missing.

    Most often another Python runs than the one that has them.

    Args:
      training: whether those for training, evaluation and data sets are needed too.
    """
    missing = missing_of(LIBRARIES)
    how = "pip install -r requirements.txt"
    if not missing and training:
        missing = missing_of(TRAINING)
        how = f"pip install 'xception_flax[train]' (in a clone: {how})"
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        print(
            f"error: {sys.executable} lacks {', '.join(missing[:3])}{more}; activate the environment that has them "
            f"(source .venv/bin/activate), or: {how}",
            file=sys.stderr,
        )
        sys.exit(2)


def check_extra(extra: str, names: tuple[str, ...], what: str) -> None:
    """Raises UserError if a library is missing that only some users need.

    Args:
      extra: that installs it, of pyproject.toml: 'onnx'.
      names: as they are imported.
      what: is not possible without them.
    """
    if missing := missing_of(names):
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install 'xception_flax[{extra}]'")
