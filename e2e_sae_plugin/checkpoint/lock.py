"""One process at a time in a run's folders."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

LOCK_FILENAME = ".run.lock"


@contextlib.contextmanager
def locked(*folders: Path) -> Iterator[None]:
    """Hold these folders for this process; they are free again when it ends, however it ends.

    Raises:
        ValueError: another process, or another run in this one, holds one of them.
    """
    with contextlib.ExitStack() as held:
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(folder / LOCK_FILENAME, timeout=0, is_singleton=False))
            except Timeout:
                raise ValueError(
                    f"Another run is writing into {str(folder)!r} at this moment. Wait for its end, stop it, or choose "
                    "another folder."
                ) from None
            except (OSError, NotImplementedError) as error:
                logger.warning("%s cannot be locked (%s); see to it that no other run writes there.", folder, error)
                continue
            held.callback(lambda path=folder / LOCK_FILENAME: path.unlink(missing_ok=True))
        yield
