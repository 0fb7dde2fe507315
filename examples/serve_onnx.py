"""Names and probabilities from `fgvc export RUN --to onnx --output FOLDER`, without fgvc and without torch.

pip install onnxruntime numpy pillow
python serve_onnx.py FOLDER/model.onnx IMAGE ...
"""

import json
import sys
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from PIL import Image, ImageOps


def prepare(path: str, recipe: dict[str, Any]) -> np.ndarray:
    """An image file as the model's input (3, size, size): resized and cut as fgvc does it in testing."""
    side, size = recipe["resize_size"], recipe["size"]
    with Image.open(path) as file:
        file.draft(None, (2 * side, 2 * side))  # of a large JPEG a smaller one is decoded
        image = ImageOps.exif_transpose(file).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    width, height = (side * n // min(image.size) if recipe["resize"] == "short" else side for n in image.size)
    image = image.resize((width, height), Image.Resampling[recipe["interpolation"].upper()])
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return ((pixels - np.float32(recipe["mean"])) / np.float32(recipe["std"])).transpose(2, 0, 1)


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = json.loads(session.get_modelmeta().custom_metadata_map["fgvc"])
for path in sys.argv[2:]:
    (logits,) = session.run(None, {"images": prepare(path, facts["preprocessing"])[None]})
    powers = np.exp((logits[0] - logits.max()).astype(np.float64) / (facts["temperature"] or 1))
    shares = {facts["classes"][i]: powers[i] / powers.sum() for i in np.argsort(-powers)[:5]}
    print(json.dumps({"path": path, "probabilities": shares}))
