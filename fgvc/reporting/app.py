"""A page to play with: names of an image, where the run looks, and the nearest training images.

The page is gradio's (`pip install 'fgvc[app]'`), on this machine alone. It asks nothing of the network.
"""

import base64
import io
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fgvc.errors import ConfigError, RunError, UserError
from fgvc.inference.neighbours import NeighbourIndex, load_neighbours
from fgvc.inference.predict import Predictor, load_run
from fgvc.presentation.style import class_name
from fgvc.reporting.predictions import METHOD, picture
from fgvc.runs.spectra import median_rank
from fgvc.runs.summary import read_run
from fgvc.spectral import covariance_eigenvalues
from fgvc.studies.attribution import explain_bands, restrict_spectrum
from fgvc.studies.attribution.report import overlay

_FAILURES = (UserError, OSError, RuntimeError)  # OSError: the upload is gone
NAMES, NEIGHBOURS = 5, 6
"""Number of names and of training images that the page shows."""


_KEPT = 3600  # seconds after which an upload is deleted, in a session that goes on


class Figure(NamedTuple):
    """A picture (H, W, 3) uint8 with the text under it."""

    pixels: np.ndarray
    title: str
    note: str = ""


class Answers:
    """What the page says of an image; one call at a time, as the maps of a band change the head while they are made.

    Args:
        predictor: model of the run.
        index: its training images, or the reason why there are none to show.
    """

    def __init__(self, predictor: Predictor, index: NeighbourIndex | str) -> None:
        self.predictor = predictor
        self.index = index
        shown = [class_name(name) for name in predictor.classes]
        unique = len(set(shown)) == len(shown)
        self._shown = dict(zip(predictor.classes, shown if unique else predictor.classes, strict=True))
        self._lock = threading.Lock()

    @property
    def most_eigenvalues(self) -> int:
        """Largest number of eigenvalues at one end of the spectrum; 0 if the head has none to choose from."""
        model = self.predictor.model
        try:
            with restrict_spectrum(model, 1):
                height, width = model.backbone.out_shape[1:]
                return min(model.head.pooling.channels, height * width - 1)  # a covariance has no higher rank
        except RunError:
            return 0

    def names(self, image: Path) -> dict[str, float]:
        """The most probable classes and their probabilities. Raises ImageError, RunError as `Predictor.predict`."""
        with self._lock:
            found = self.predictor.predict(image, NAMES)
        return {self._shown[name]: share for name, share in zip(found.names, found.probabilities, strict=True)}

    def maps(self, image: Path, size: int) -> tuple[str, list[Figure]]:
        """The first name of an image; and the image, then under the map of that name for all eigenvalues, for the
        `size` largest and the `size` smallest. A head without a spectrum to choose from has one map.

        Raises ImageError, RunError as `Predictor.predict` and `explain`.
        """
        model, inputs = self.predictor.model, self.predictor.prepare(image)
        bands, titles = ["all"], ["the map"]
        with self._lock:
            if self.most_eigenvalues:
                size = min(size, self._rank(inputs))
                bands += [f"top{size}", f"bottom{size}"]
                titles = ["all eigenvalues", f"the {size} largest", f"the {size} smallest"]
            found = explain_bands(model, inputs[None], bands, method=METHOD)
        seen = self.predictor.transform.picture(inputs).cpu().numpy()
        pixels = [overlay(seen, attribution.maps[0].cpu().numpy(), signed=True) for attribution in found]
        plain = Figure((255 * seen + 0.5).astype(np.uint8), "as the model sees it")
        name = self._shown[self.predictor.classes[int(found[0].classes[0])]]
        return name, [plain, *(Figure(of_band, title) for of_band, title in zip(pixels, titles, strict=True))]

    @torch.inference_mode()
    def _rank(self, inputs: Tensor) -> int:
        batch = inputs[None].to(self.predictor.device, memory_format=torch.channels_last)
        return median_rank(covariance_eigenvalues(self.predictor.model.pooling_input(batch)).cpu().numpy())

    def neighbours(self, image: Path) -> list[Figure]:
        """The nearest training images with class and distance; none without an index."""
        if isinstance(self.index, str):
            return []
        with self._lock:
            descriptor = self.predictor.embed(image)
        count = min(NEIGHBOURS, len(self.index.images))
        return [
            Figure(
                (255 * picture(self.index, near) + 0.5).astype(np.uint8),
                self._shown[near.name],
                f"distance {near.distance:.3f}",
            )
            for near in self.index.nearest(descriptor[None], count)[0]
        ]


_PARTS = jinja2.Environment(loader=jinja2.PackageLoader(__package__, "assets"), autoescape=True)
_HEAD = _PARTS.from_string("<h1>{{ title }}</h1><p>{{ facts }}</p>")


def _html(title: str, figures: Sequence[Figure], text: str, least: int) -> str:
    """Figures of at least `least` pixels in rows, with their pixels in the page: no file is kept."""
    data = []
    for figure in figures:
        buffer = io.BytesIO()
        Image.fromarray(figure.pixels).save(buffer, "JPEG", quality=90)
        data.append(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return _PARTS.get_template("figures.html").render(title=title, figures=figures, text=text, data=data, least=least)


_BANDS = (
    "The head reads the covariance of the features: its largest eigenvalues belong to their strongest common "
    "variation, its smallest to the weakest."
)
_DROP = "Drop an image here, or click to choose one.\nIt stays on this machine."
_PLAIN = "This head has no eigenvalues to choose from."
_DISTANCE = "Distance: 1 minus the cosine of the angle between the descriptors."


def _reason(error: Exception, image: str) -> str:
    """The message of an error without the temporary name of an upload."""
    return str(error).replace(image, "The image")


def build_app(answers: Answers, title: str, facts: str) -> Any:
    """Return the page as gradio's Blocks.

    Raises:
        ConfigError: gradio is not installed.
    """
    gradio = _gradio()
    most = answers.most_eigenvalues

    def look(image: str | None, size: int) -> str:
        if image is None:
            return ""
        try:
            name, figures = answers.maps(Path(image), size)
            text = (
                f"Red speaks for {name}, blue against it. Each map has a scale of its own. {_BANDS if most else _PLAIN}"
            )
        except _FAILURES as error:
            figures, text = [], _reason(error, image)
        return _html("Where it looks", figures, text, 130)

    def near(image: str) -> str:
        figures, text = [], answers.index if isinstance(answers.index, str) else _DISTANCE
        try:
            figures = answers.neighbours(Path(image))
        except _FAILURES as error:
            text = _reason(error, image)
        return _html("Nearest training images", figures, text, 110)

    def answer(image: str | None, size: int) -> tuple[Any, Any, Any, dict[str, float] | None, str, str]:
        hidden, shown = gradio.update(visible=False), gradio.update(visible=True)
        if image is None:
            return hidden, hidden, hidden, None, "", ""
        try:
            names = answers.names(Path(image))
        except _FAILURES as error:
            reason = gradio.update(visible=True, value=_html("No answer", [], _reason(error, image), 0))
            return hidden, hidden, reason, None, "", ""
        return shown, shown, hidden, names, look(image, size), near(image)

    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(60, _KEPT)) as blocks:
        gradio.HTML(_HEAD.render(title=title, facts=facts), elem_classes="fgvc")
        with gradio.Row():
            image = gradio.Image(
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                label="Image",
                height=320,
                buttons=[],
                placeholder=_DROP,
            )
            # gradio opens a file to find its kind, and ends with a traceback where it is no image; our reader says why
            image.preprocess = lambda upload: None if upload is None else upload.path
            with gradio.Column(visible=False) as named:
                names = gradio.Label(num_top_classes=NAMES, label="Names and probabilities", show_heading=True)
        failure = gradio.HTML(elem_classes="fgvc", visible=False)
        with gradio.Column(visible=False) as results:
            maps = gradio.HTML(elem_classes="fgvc")
            size = gradio.Slider(
                *(1, max(most, 2), max(most // 3, 1)),
                step=1,
                label="Number of eigenvalues at each end of the spectrum",
                visible=bool(most),
            )
            nearest = gradio.HTML(elem_classes="fgvc")
        hidden = {"api_visibility": "private", "show_progress_on": [image]}
        image.change(answer, [image, size], [named, results, failure, names, maps, nearest], **hidden)
        size.change(look, [image, size], maps, trigger_mode="always_last", **hidden)
    return blocks


def serve_run(
    path: Path,
    *,
    checkpoint: str = "last",
    root: str | None = None,
    cache: str | None = None,
    neighbours: bool = True,
    port: int | None = None,
) -> None:
    """Serve the page of a run on 127.0.0.1 until the process is interrupted.

    Args:
        path: the run folder.
        checkpoint, root, cache: as in `load_neighbours`.
        neighbours: whether to show training images.
        port: port of the page; None takes a free one from 7860.

    Raises:
        ConfigError: gradio is not installed, or the port is taken.
        RunError, WeightsError: as `load_run`.
    """
    with tempfile.TemporaryDirectory(prefix="fgvc-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # of uploads; it goes with the process
        gradio = _gradio()
        predictor, run = load_run(path, checkpoint), read_run(path)
        index: NeighbourIndex | str = "Not asked for: the page was started with --no-neighbours."
        if neighbours:
            try:
                index = load_neighbours(path, checkpoint=checkpoint, root=root, cache=cache)
            except UserError as error:
                index = f"The training images are not here (--root tells where they are): {error}"
        facts = f"{len(predictor.classes)} classes, backbone {run.backbone}, {checkpoint} weights."
        title = f"{run.label} on {run.dataset}"
        said = [facts, _trust(predictor, path), *(f"Note: {note}." for note in predictor.notes)]
        blocks = build_app(Answers(predictor, index), title, " ".join(said))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        url = launch(gradio, blocks, port)
        print(f"{url} (on this machine alone; end it with Ctrl-C)", flush=True)
        threading.Event().wait()


def _trust(predictor: Predictor, path: Path) -> str:
    """What the probabilities are worth."""
    if predictor.calibrated and predictor.calibration is not None:
        images, split = predictor.calibration.images, predictor.calibration.split
        return f"Probabilities are calibrated on {images:,} {split} images."
    return f"Probabilities are not calibrated; fgvc calibrate {path} does that."


def launch(gradio: Any, blocks: Any, port: int | None = None) -> str:
    """Start to serve a page on 127.0.0.1 and return its address. Raises ConfigError if the port is taken."""
    fonts = {name: ["system-ui", "sans-serif"] for name in ("font", "font_mono")}  # none is fetched
    try:
        _, url, _ = blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            max_file_size="50mb",
            theme=gradio.themes.Default(primary_hue="blue", **fonts),
            css=_PARTS.get_template("app.css").render(),
        )
    except OSError as error:
        raise ConfigError(f"port={port} cannot be used ({error}); give another --port, or none") from error
    return str(url)


def _gradio() -> Any:
    """Import gradio without its telemetry. Raises ConfigError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ConfigError("fgvc app needs the library gradio: pip install 'fgvc[app]'") from error
    return gradio
