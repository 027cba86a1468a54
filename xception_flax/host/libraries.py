"""What must be installed. Like `signals` it imports very little: it runs before the imports that would fail."""

import importlib.util
import sys

from xception_flax.text.errors import UserError

# The dependencies of pyproject.toml, as they are imported.
LIBRARIES = (
    "jax", "flax", "optax", "orbax", "grain", "numpy", "ml_collections", "absl", "array_record", "cv2", "h5py",
    "huggingface_hub", "imagehash", "importlib_resources", "matplotlib", "packaging", "PIL", "pooch", "pyarrow", "rich",
    "safetensors", "scipy", "simplejpeg", "sklearn", "tensorboardX", "tensorflow_datasets",
)  # fmt: skip


def check_libraries() -> None:
    """Ends the process with code 2 and a line on standard error if a library is missing.

    Most often another Python runs than the one that has them.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        print(
            f"error: {sys.executable} lacks {', '.join(missing[:3])}{more}; activate the environment that has them "
            "(source .venv/bin/activate), or: pip install -r requirements.txt",
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
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install 'xception_flax[{extra}]'")
