"""From the bytes of a file to uint8 `[H, W, C]`, or a `BadImageError` that says what is wrong with them.

JPEGs by libjpeg-turbo (simplejpeg), all else by Pillow. A file is decoded to its end or refused:
libjpeg's warnings, with which OpenCV, Pillow and TensorFlow return a picture that is gray or
displaced below some row, are errors here. A JPEG has no checksum: bytes changed into others that are
valid too, nobody can see.
"""

import io
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image as pillow

Image = np.ndarray

# 256 MiB as RGB, which is Pillow's own limit too: 9,459 x 9,459. Of what a header claims, before memory is taken.
MAX_PIXELS = 2**28 // 3

FORMATS = ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # of Pillow's 40; some of the others start programs

# The one of libjpeg's warnings that is not about pixels; cameras and web sites have written such files.
_UNKNOWN_VERSION = "unknown JFIF revision number"

warnings.filterwarnings("ignore", category=pillow.DecompressionBombWarning)  # `MAX_PIXELS` is checked, and is an error
warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)  # alpha is left out, and meant to be


class BadImageError(ValueError):
    """A file, or a record, that holds no image as it should."""


def decode(image: bytes | np.ndarray, channels: int, min_side: int = 0) -> Image:
    """Returns uint8 `[H, W, channels]` from an encoded file or from `[H, W]` / `[H, W, C]` uint8.

    One channel becomes three by repetition, three become one by the luma of JPEG (ITU-R BT.601). Of
    16 bits the upper 8 count, of an animation the first frame; alpha is left out. Orientation tags
    are ignored, as ImageNet's readers do. The file's content decides what it is, not its name.

    Args:
      image: the content of a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM file, or pixels.
      channels: 1 or 3.
      min_side: where it is positive, a JPEG is decoded at the smallest of 1/2, 3/8, 1/4 and 1/8 of its size at
        which both sides keep so many pixels, whole if at none: faster by far for photos of many
        megapixels, and another picture than the whole one scaled, since libjpeg leaves out frequencies.

    Raises:
      BadImageError: the file cannot be decoded to its end, is larger than `MAX_PIXELS`, or the array
        is no uint8 image.
    """
    if isinstance(image, bytes):
        image = _decode_jpeg(image, channels, min_side) if image[:2] == b"\xff\xd8" else _decode_other(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
        raise BadImageError(f"an image must be uint8 [H, W] or [H, W, C], got {image.dtype} {image.shape}.")
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[-1] == 1 and channels == 3:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.shape[-1] == 3 and channels == 1:
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    if image.shape[-1] != channels:
        raise BadImageError(f"an image has {image.shape[-1]} channels, but data.channels is {channels}.")
    return image


def _decode_jpeg(content: bytes, channels: int, min_side: int) -> Image:
    options = dict(colorspace="GRAY" if channels == 1 else "RGB")
    if min_side:
        options |= dict(min_height=min_side, min_width=min_side, min_factor=2)
    try:
        _check_size(*simplejpeg.decode_jpeg_header(content)[:2])
        return simplejpeg.decode_jpeg(content, **options)
    except BadImageError:
        raise
    except ValueError as error:
        version = content.find(b"JFIF\0") + len(b"JFIF\0")
        if _UNKNOWN_VERSION in str(error) and content[version : version + 2] != b"\1\1":
            # libjpeg tells the first warning only: with a version that it knows the next is seen.
            return _decode_jpeg(content[:version] + b"\1\1" + content[version + 2 :], channels, min_side)
        raise _undecodable(content, error) from None


def _decode_other(content: bytes) -> Image:
    try:
        with pillow.open(io.BytesIO(content), formats=FORMATS) as file:
            _check_size(file.height, file.width)
            if file.mode.startswith("I;16"):  # which `convert` would clip and not scale
                return (np.asarray(file) >> 8).astype(np.uint8)
            if file.mode in ("I", "F"):
                raise BadImageError(f"an image of 32 bits a channel (Pillow's mode {file.mode!r}); expected 8 or 16.")
            gray = file.mode in ("1", "L", "LA")
            return np.array(file.convert("L" if gray else "RGB"))
    except (BadImageError, MemoryError):
        raise
    except pillow.DecompressionBombError:
        raise BadImageError(f"it claims more than the {MAX_PIXELS:,} pixels that an image may have.") from None
    except Exception as error:  # of what is no image Pillow's readers raise anything
        raise _undecodable(content, error) from None


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImageError(
            f"it claims {width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} that an image may have."
        )


def _undecodable(content: bytes, error: Exception) -> BadImageError:
    if not content:
        return BadImageError("the image cannot be decoded: the file is empty.")
    if isinstance(error, pillow.UnidentifiedImageError):  # whose text is the address of an object
        return BadImageError(
            f"the image cannot be decoded: {len(content):,} bytes that are no JPEG, {', '.join(FORMATS)}."
        )
    return BadImageError(f"the image cannot be decoded ({len(content):,} bytes): {str(error).rstrip('.')}.")
