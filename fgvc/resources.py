"""Folders that fgvc reads and that hold no modules of it: in the package where it is installed, else beside it."""

from pathlib import Path

from fgvc.errors import UserError

_PACKAGE = Path(__file__).resolve().parent


def resource_folder(name: str) -> Path:
    """The folder `name` of the installed package, or of the checkout that fgvc is imported from.

    Args:
        name: "configs" (Hydra), "datasets" (the cards), "results/paper" (published numbers) or "scripts".

    Raises:
        UserError: it is in neither place.
    """
    places = [_PACKAGE / name, _PACKAGE.parent / name]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(f"{places[0]}: no such folder, nor {places[1]}; install fgvc again, or take a whole checkout")
