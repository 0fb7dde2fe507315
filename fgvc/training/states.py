"""The states that a run can be continued from: written whole or not at all, checked before they are used."""

import logging
from pathlib import Path
from typing import Any

import torch

from fgvc.data.checksums import checksum_problem, file_digests
from fgvc.errors import RunError
from fgvc.files import atomic_path, write_json_atomic
from fgvc.reading import load_pytorch, read_json_object

_log = logging.getLogger(__name__)

KEPT = 2
"""States that are kept: the newest, and the one before it in case the newest is damaged."""


class StateStore:
    """The states of a run in a folder, as state-000001.pt, state-000002.pt, ...

    Beside each stands a card, state-000001.json, with its size and checksum. It is written last: a state without a card
    is one whose writing was cut short, and does not count.

    Args:
        folder: created by the first `write`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: set[Path] = set()

    def exists(self) -> bool:
        """Whether there is a state, damaged or not."""
        return bool(self._complete())

    def write(self, state: dict[str, Any], **about: Any) -> None:
        """Add a state of tensors, numbers, texts, lists and dicts; `about` goes into its card. Prunes older ones."""
        # to keep a damaged one would cost the whole one before it
        complete = [path for path in self._complete() if path not in self._damaged]
        number = 1 + max((_number(path) for path in self.folder.glob("state-*.pt")), default=0)
        path = self.folder / f"state-{number:06d}.pt"
        # opened here: of a file that torch opens, it does not say that the disk is full
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
        write_json_atomic(_card(path), {**about, "bytes": path.stat().st_size, **file_digests(path, ["sha256"])})
        self._keep([*complete[: KEPT - 1], path])

    def clear(self) -> None:
        """Delete all states: they are of another run than the one that begins."""
        self._keep([])

    def keep_newest(self) -> None:
        """Delete all states but the newest."""
        self._keep(self._complete()[:1])

    def read(self) -> dict[str, Any]:
        """The newest state that is whole; nothing in it is executed. A damaged one is named in the log and passed over.

        Raises:
            RunError: there is none, or all are damaged.
        """
        damages: dict[Path, str] = {}
        # listed anew after each: a run that is still training replaces its states while another one reads them
        while path := next((path for path in self._complete() if path not in damages), None):
            try:
                return _read(path)
            except (OSError, ValueError) as error:
                self._damaged.add(path)
                damages[path] = f"{path} is damaged ({error})"
                _log.warning("%s; trying the state before it", damages[path])
        if not damages:
            raise RunError(f"{self.folder} holds no state to continue from: the run has saved none yet")
        raise RunError(
            f"{'; '.join(damages.values())}; none is left to continue from: delete {self.folder.parent}, train again"
        )

    def _complete(self) -> list[Path]:
        """States that have a card, the newest first."""
        return sorted(
            (path for path in self.folder.glob("state-*.pt") if _card(path).is_file()), key=_number, reverse=True
        )

    def _keep(self, kept: list[Path]) -> None:
        for path in self.folder.glob("state-*.pt"):
            if path not in kept:
                _card(path).unlink(missing_ok=True)  # first: a card without its state would be a damage
                path.unlink(missing_ok=True)
        for card in self.folder.glob("state-*.json"):
            if not card.with_suffix(".pt").exists():  # somebody has deleted the state
                card.unlink(missing_ok=True)


def _card(path: Path) -> Path:
    return path.with_suffix(".json")


def _number(path: Path) -> int:
    digits = path.stem.partition("-")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def _read(path: Path) -> dict[str, Any]:
    """Raises OSError where it cannot be read, ValueError where it is not what was written."""
    card = read_json_object(_card(path))
    size = path.stat().st_size
    if size != card.get("bytes"):
        raise ValueError(f"{size} bytes, {card.get('bytes')} were written")
    problem = checksum_problem(path, {"sha256": str(card.get("sha256"))})
    if problem is not None:
        raise ValueError(problem)
    try:
        state = load_pytorch(path)
    except Exception as error:  # zip, pickle and key errors alike; a file that was put here on purpose
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if not isinstance(state, dict):
        raise ValueError("it does not hold a dictionary")
    return state
