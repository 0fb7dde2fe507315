"""Folders with files that fgvc reads: inside the installed package, or next to it in a checkout."""

from pathlib import Path

from fgvc.errors import UserError

_PACKAGE = Path(__file__).resolve().parent


def resource_folder(name: str) -> Path:
    """Return the folder `name` of the installed package, or of the checkout that fgvc is imported from.

    Args:
        name: "configs" (Hydra), "datasets" (the cards), "results/paper" (published numbers) or "scripts".

    Raises:
        UserError: the folder is in neither place.
    """
    places = [_PACKAGE / name, _PACKAGE.parent / name]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(f"{places[0]} and {places[1]}: no such folder; install fgvc again, or use a complete checkout")
