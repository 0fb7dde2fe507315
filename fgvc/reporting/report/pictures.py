"""Pictures as they lie in the page: small enough to carry, and nothing but pixels."""

import io
import warnings
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from fgvc.data.image_file import UnreadableImageError, decode_rgb
from fgvc.errors import RunError
from fgvc.presentation.style import figure_style
from fgvc.reporting.report.content import Picture

_QUALITY = 80  # of WebP
_DPI = 150
_LONGEST_WORD, _LONGEST_TEXT = 60, 400  # letters


def read_picture(path: Path, width: int, text: str, caption: str = "") -> Picture:
    """An image file at no more than `width` pixels, as WebP without metadata. Raises RunError where it is no image."""
    try:
        image = decode_rgb(path)
    except UnreadableImageError as error:
        raise RunError(f"{path}: cannot be shown ({error}); make it again") from error
    image.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return Picture("image/webp", buffer.getvalue(), image.size, text, caption)


def figure_picture(figure: Figure, text: str) -> Picture:
    """A figure as a PNG of 256 colours."""
    for written in figure.findobj(Text):
        assert isinstance(written, Text)
        written.set_text(_fitting(written.get_text()))
        if "$" in written.get_text():  # in a name; powers of ten, which are formulas, are written at axes when drawn
            written.set_parse_math(False)
    drawn, packed = io.BytesIO(), io.BytesIO()
    with figure_style(), warnings.catch_warnings():
        # a class may be named in any script, and at any length
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(drawn, format="png", dpi=_DPI)
    image = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(packed, "PNG", optimize=True)
    return Picture("image/png", packed.getvalue(), image.size, text)


def _fitting(text: str) -> str:
    """A text of a figure without words that are wider than its panels, and no longer than three lines."""
    words = [word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_WORD]}…" for word in text.split(" ")]
    joined = " ".join(words).encode("utf-8", "replace").decode("utf-8")
    return joined if len(joined) <= _LONGEST_TEXT else f"{joined[:_LONGEST_TEXT]}…"
