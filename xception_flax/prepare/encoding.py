"""Images at the size that training needs: scaled down, and written as JPEG anew."""

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from PIL import ExifTags
from PIL import Image as pillow

from xception_flax.data import decoding
from xception_flax.data.sources.tfds import REENCODED, Reencoding
from xception_flax.data.transforms.resampling import resample

OPAQUE = 255


def reencode(content: bytes, to: Reencoding) -> bytes:
    """Returns an image as a JPEG whose longer side is `to.max_side`, or `content` itself.

    It is scaled with antialiasing, by Pillow's bicubic kernel, and has 4:2:0 chroma, as nearly all of ImageNet; a gray
    image becomes a gray JPEG. Its pixels stay as they are stored and keep EXIF's orientation, so that
    `data.orientation` means the same as before. No other metadata is kept: no profile of colours either, which
    `decoding.decode` ignores.

    Returned as they are: images that are no larger, those with alpha that is not opaque or with 16 bits a channel, of
    which a JPEG would lose a part, and those that cannot be decoded, which training treats as before.

    Args:
      content: of a file, of any format that `decoding.decode` reads.
      to: size and quality.
    """
    try:
        pixels = decoding.decode(content, decoding.ALPHA + 1)
        height, width = pixels.shape[:2]
        longer = max(height, width)
        if longer <= to.max_side or pixels[..., decoding.ALPHA].min() < OPAQUE:
            return content
        if decoding.largest_value(content) is not None:
            return content
        orientation = decoding.orientation_of(content)
    except decoding.BadImageError:
        return content
    colors = pixels[..., : decoding.ALPHA]
    gray = (colors == colors[..., :1]).all()
    new_height, new_width = (max(1, round(side * to.max_side / longer)) for side in (height, width))
    given = colors[..., :1] if gray else colors
    scaled = np.ascontiguousarray(resample(given, new_height, new_width, "bicubic", antialias=True))
    kind, chroma = ("GRAY", "Gray") if gray else ("RGB", "420")
    return _with_orientation(simplejpeg.encode_jpeg(scaled, to.quality, kind, chroma), orientation)


def _with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """Returns a JPEG with EXIF's orientation, behind the JFIF header with which libjpeg begins."""
    if orientation not in range(2, 9):
        return jpeg
    exif = pillow.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = exif.tobytes()
    app1, length = b"\xff\xe1", (2 + len(content)).to_bytes(2)
    end = 4 + int.from_bytes(jpeg[4:6])
    return jpeg[:end] + app1 + length + content + jpeg[end:]


def name_of(name: str, to: Reencoding) -> str:
    """Returns the name of a data set of the re-encoded images: 'photos' -> 'photos_400px_q90'."""
    return f"{name}_{to.max_side}px_q{to.quality}"


def metadata(to: Reencoding | None) -> tfds.core.MetadataDict | None:
    """Returns what TFDS writes into a data set's `metadata.json`, which source 'tfds' reads; None for originals."""
    return None if to is None else tfds.core.MetadataDict({REENCODED: to._asdict()})
