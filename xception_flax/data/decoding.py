"""From the bytes of a file to uint8 `[H, W, C]`, or a `BadImageError` that says what is wrong with them.

JPEGs by libjpeg-turbo (simplejpeg), all else by Pillow. A file is decoded to its end or refused:
libjpeg's warnings, with which OpenCV, Pillow and TensorFlow return a picture that is gray or
displaced below some row, are errors here. A JPEG has no checksum: bytes changed into others that are
valid too, nobody can see.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
from PIL import Image as pillow

from xception_flax.text.errors import UserError

Image = np.ndarray

# 256 MiB as RGB, which is Pillow's own limit too: 9,459 x 9,459. Of what a header claims, before memory is taken.
MAX_PIXELS = 2**28 // 3

FORMATS = ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # of Pillow's 40; some of the others start programs

# Of 16 bits. No header says which value is white, but PNM's: PNG's sBIT tells how exact the values are, which are
# scaled to 16 bits all the same, and TIFF's MaxSampleValue is of one image and by its definition not for display.
WHITE = 2**16 - 1
TIFF_BITS = 258  # the tag BitsPerSample

# The one of libjpeg's warnings that is not about pixels; cameras and web sites have written such files.
_UNKNOWN_VERSION = "unknown JFIF revision number"

warnings.filterwarnings("ignore", category=pillow.DecompressionBombWarning)  # `MAX_PIXELS` is checked, and is an error
warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)  # alpha is left out, and meant to be


class BadImageError(UserError):
    """A file, or a record, that holds no image as it should."""


def decode(image: bytes | np.ndarray, channels: int, min_side: int = 0, max_value: int | None = None) -> Image:
    """Returns uint8 `[H, W, channels]` from an encoded file or from `[H, W]` / `[H, W, C]` uint8.

    One channel becomes three by repetition, three become one by the luma of JPEG (ITU-R BT.601). Of an animation the
    first frame counts; alpha is left out. Orientation tags are ignored, as ImageNet's readers do, but for TIFF's, which
    Pillow applies. The file's content decides what it is, not its name.

    Args:
      image: the content of a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM file, or pixels.
      channels: 1 or 3.
      min_side: where it is positive, a JPEG is decoded at the smallest of 1/2, 3/8, 1/4 and 1/8 of its size at
        which both sides keep so many pixels, whole if at none: faster by far for photos of many
        megapixels, and another picture than the whole one scaled, since libjpeg leaves out frequencies.
      max_value: of files of 16 bits, the value that becomes 255, from 255 to 65,535: a value becomes
        `value * 256 // (max_value + 1)`. None is 65,535, of which the upper 8 bits are left; but of the colours of
        PPM Pillow rounds to the nearest, `value * 255 / 65,535`.

    Raises:
      BadImageError: the file cannot be decoded to its end, is larger than `MAX_PIXELS`, has values above
        `max_value`, or the array is no uint8 image.
    """
    if isinstance(image, bytes):
        image = _decode_jpeg(image, channels, min_side) if image[:2] == b"\xff\xd8" else _decode_other(image, max_value)
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


def _decode_other(content: bytes, max_value: int | None) -> Image:
    max_value = max_value or WHITE
    with _opened(content) as file:
        # Of colours Pillow keeps the upper 8 bits, as wanted where they count.
        values = _sixteen_bits(file, content, colors=max_value != WHITE)
        if values is not None:
            if (largest := int(values.max(initial=0))) > max_value:
                raise BadImageError(f"it has values up to {largest:,}, more than data.max_value={max_value}.")
            return (values.astype(np.uint32) * 256 // (max_value + 1)).astype(np.uint8)
        if file.mode in ("I", "F"):
            raise BadImageError(
                f"an image of 32 bits a channel, or of negative values (Pillow's mode {file.mode!r}); expected 8 or 16 "
                "bits."
            )
        gray = file.mode in ("1", "L", "LA")
        return np.array(file.convert("L" if gray else "RGB"))


def largest_value(content: bytes) -> int | None:
    """Returns the largest value in a file of 16 bits a channel; None for one of 8.

    Raises:
      BadImageError: see `decode`.
    """
    if content[:2] == b"\xff\xd8":
        return None
    with _opened(content) as file:
        values = _sixteen_bits(file, content, colors=True)
        return None if values is None else int(values.max(initial=0))


def is_dark(largest: int) -> bool:
    """Whether values up to `largest` make no use of the upper half of 16 bits."""
    return largest <= WHITE // 2


def white(largest: int) -> int:
    """Which value is white, of 8, 9, ... 16 bits, where values go up to `largest`."""
    return 2 ** max(8, largest.bit_length()) - 1


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[pillow.Image]:
    try:
        with pillow.open(io.BytesIO(content), formats=FORMATS) as file:
            _check_size(file.height, file.width)
            yield file
    except (BadImageError, MemoryError):
        raise
    except pillow.DecompressionBombError:
        raise BadImageError(f"it claims more than the {MAX_PIXELS:,} pixels that an image may have.") from None
    except Exception as error:  # of what is no image Pillow's readers raise anything
        raise _undecodable(content, error) from None


def _sixteen_bits(file: pillow.Image, content: bytes, *, colors: bool) -> np.ndarray | None:
    """Returns the values `[H, W]` or `[H, W, 3]` of a file of 16 bits a channel; None for one of 8.

    Args:
      colors: look at colours and alpha too; without, those are None.
    """
    bits = file.tag_v2.get(TIFF_BITS, (8,))[0] if file.format == "TIFF" else 16
    if file.mode.startswith("I;16"):
        values = np.asarray(file)
        return values << 4 | values >> 8 if bits == 12 else values  # of 12 bits it is known which value is white
    if file.format == "PPM" and file.mode == "I":
        return np.asarray(file).astype(np.uint16)  # scaled by Pillow from the largest value that the header names
    if not colors or file.format not in ("PNG", "TIFF", "PPM") or file.mode not in ("RGB", "RGBA", "RGBX", "L", "LA"):
        return None
    args = file.tile[0][3]  # how the pixels lie in the file: 'RGB;16B', or ('RGB', 65535)
    rawmode, *rest = args if isinstance(args, tuple) else (args,)
    if "16" not in str(rawmode) and rest != [WHITE]:
        return None
    file.load()  # so that a damaged file is refused as ever: OpenCV reads over much
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.shape[:2] != (file.height, file.width):
        raise BadImageError("the 16 bits of its colours cannot be read; write it anew, as a PNG.")
    return values if values.ndim == 2 else values[..., 2::-1]


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
