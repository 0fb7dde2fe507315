"""What a run says when it cannot go on: memory, dead loader processes, losses that grow, numbers that are not finite."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fgvc.data import WatchedSamples, loader_failure, naming_files
from fgvc.errors import ConfigError, DatasetError
from fgvc.training.memory import memory_advice, out_of_memory

PATHS = [Path("birds") / f"{index}.jpg" for index in range(6)]


class Samples(Dataset[int]):
    """Six samples; reading one of them does `harm`."""

    def __init__(self, bad: int, harm: Callable[[], object]) -> None:
        self.bad, self.harm = bad, harm

    def __len__(self) -> int:
        return len(PATHS)

    def __getitem__(self, index: int) -> int:
        if index == self.bad:
            self.harm()
        return index


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def refuse() -> None:
    try:
        raise OSError("cut short")
    except OSError as error:
        raise DatasetError("birds/4.jpg: cut short.\nReplace it") from error


def read(harm: Callable[[], object], bad: int = 4, workers: int = 1) -> list[int]:
    # a dead worker may hold the lock of a queue, for which torch gives the others seconds: one will do
    watched = WatchedSamples(Samples(bad, harm), workers)
    with naming_files(watched, PATHS):
        return torch.cat(list(DataLoader(watched, batch_size=1, num_workers=workers))).tolist()


@pytest.mark.parametrize(("harm", "how"), [(kill, "signal: Killed"), (leave, "exit code 3")])
def test_a_worker_that_dies_is_named_by_its_file(harm: Callable[[], object], how: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read(harm)
    message = str(caught.value)
    assert message.startswith(f"{PATHS[4]}: a worker process of the loader died ({how}) while"), message
    assert "trainer.workers" in message and len(message) < 400


def test_a_refusal_in_a_worker_comes_through_with_its_own_message() -> None:
    with pytest.raises(DatasetError) as caught:
        read(refuse)
    assert str(caught.value) == "birds/4.jpg: cut short.\nReplace it"


def test_watching_changes_nothing_and_other_failures_pass() -> None:
    assert read(kill, bad=-1, workers=2) == list(range(6))
    watched = WatchedSamples(Samples(4, kill), workers=1)
    assert watched[2] == 2 and len(watched) == 6 and watched.in_progress() == []
    for error in (RuntimeError("shapes differ"), KeyError("a"), ConfigError("no such key"), DatasetError("no image")):
        assert loader_failure(error, watched, PATHS) is None


def test_a_worker_that_dies_between_images_is_not_blamed_on_one() -> None:
    failure = loader_failure(
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        WatchedSamples(Samples(0, kill), 2),
        PATHS,
    )
    assert isinstance(failure, DatasetError)
    assert "died (signal: Killed) between two images" in str(failure)


def test_memory_that_cannot_be_had_names_what_needs_less() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)  # 4 PiB
    failure = out_of_memory(caught.value, batch_size=32, accumulation=2)
    assert failure is not None and failure.exit_status == 1
    message = str(failure)
    assert "4,294,967,296.0 MiB" in message and "16 images at a time" in message
    assert "trainer.accumulation=4: 8 at a time" in message and "trainer.batch_size=32" in message
    with pytest.raises(MemoryError) as refused:
        np.empty(2**50)
    assert "8.00 PiB" in str(memory_advice(refused.value, batch_size=8, accumulation=1))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 8 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB). Tried to allocate 1.50 GiB on private pool."),
    ],
)
def test_memory_of_a_gpu(error: BaseException) -> None:
    advice = memory_advice(error, batch_size=12, accumulation=1, processes=2)
    assert advice is not None
    assert "another 1.50 GiB" in advice and "6 images at a time" in advice and "trainer.accumulation=2: 3 at" in advice


def test_one_image_at_a_time_cannot_be_halved_and_other_errors_are_left_alone() -> None:
    advice = memory_advice(MemoryError(), batch_size=8, accumulation=8)
    assert advice is not None and "trainer.accumulation=" not in advice and "dataset.transform.size" in advice
    odd = memory_advice(MemoryError(), batch_size=3, accumulation=2)
    assert odd is not None and "trainer.accumulation=4: 1 at a time" in odd
    assert (
        memory_advice(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), batch_size=8, accumulation=1) is None
    )
