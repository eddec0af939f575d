"""One server a data folder, and where it can be found."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from pathlib import Path

from modelpress_server.config import SettingsError
from modelpress_server.shortage import shortage_of

logger = logging.getLogger(__name__)

ADDRESS_FILE = "server.json"
BOOT_FILE = "server.boot"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class DataDirLock:
    """Holds the data folder for this process; the kernel lets go of it however the process ends."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._fd = -1

    def acquire(self) -> None:
        """Raises SettingsError where another server has the folder, or it cannot be written."""
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            _close_to_others(self._data_dir)
            self._fd = os.open(self._data_dir / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingsError(f"data_dir: cannot use {self._data_dir}: {error.strerror}.") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            self._fd = -1
            raise SettingsError(
                f"data_dir: another server uses {self._data_dir}. Stop it, or choose another --data-dir."
            ) from None
        (self._data_dir / ADDRESS_FILE).unlink(missing_ok=True)

    @property
    def machine_restarted(self) -> bool:
        """Whether the machine was restarted since a server last used the folder; where it cannot tell, no."""
        boot_id = _boot_id()
        try:
            earlier = (self._data_dir / BOOT_FILE).read_text("ascii")
        except (OSError, ValueError):
            return False
        return bool(boot_id) and boot_id != earlier

    def note_boot(self) -> None:
        """Remembers for `machine_restarted` which run of the machine this is."""
        with contextlib.suppress(
            OSError
        ):  # a full disk: the next server counts a restart of the machine as one of its own
            (self._data_dir / BOOT_FILE).write_text(_boot_id(), "ascii")

    def announce(self, address: str) -> None:
        """Writes server.json, so that `compress-client --local` finds this server."""
        path = self._data_dir / ADDRESS_FILE
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps({"address": address, "pid": os.getpid()}) + "\n", "utf-8")
            temporary.chmod(0o600)
            temporary.replace(path)
        except OSError as error:
            if shortage_of(error) is None:
                raise
            logger.warning("%s could not be written: %s", path, error)

    def release(self) -> None:
        """Takes server.json away and lets go."""
        if self._fd >= 0:
            (self._data_dir / ADDRESS_FILE).unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def _close_to_others(folder: Path) -> None:
    """A folder that was there before may be open to other users, and names alone tell them of models."""
    mode = folder.stat().st_mode & 0o777
    if not mode & 0o077:
        return
    try:
        folder.chmod(0o700)
    except PermissionError:
        raise SettingsError(
            f"data_dir: {folder} is open to others (mode {mode:o}) and belongs to another user, so it cannot be "
            f"closed. Make it yours, or name a folder inside it: --data-dir {folder / 'modelpress'}."
        ) from None


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError:
        return ""
