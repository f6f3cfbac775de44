"""The secret that the machines of a run share, and with which they authenticate each other.

It comes from --secret-file, else from ARRIERO_SECRET, else from a file beside the run directory on the shared file
system: node 0 writes a fresh one at each start, readable by the user alone, and removes it at the end.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from arriero.common.errors import UserError
from arriero.common.files import make_directory, open_regular, os_error_text
from arriero.common.text import escape

SECRET_VARIABLE = "ARRIERO_SECRET"
MIN_BYTES, MAX_BYTES = 16, 4096
"""Limits of a secret's length."""
SECRET_FIX = f"give all machines one secret in the environment variable {SECRET_VARIABLE}, or with --secret-file"


class SecretMissing(UserError):  # noqa: N818 - a kind of UserError
    """Its file does not exist, or not yet: a network file system may show it late."""


@dataclass(frozen=True)
class Secret:
    """Where the secret of a run comes from. A file is read for each connection, since node 0 may have replaced it."""

    text: str = ""
    """The secret itself; empty if a file has it."""
    file: Path | None = None
    """The file that has it."""
    managed: bool = False
    """Whether arriero creates the file on node 0, and removes it."""

    @classmethod
    def find(cls, file: str, environment: Mapping[str, str], beside: Path) -> Secret:
        """From the file that the user names, else from the environment, else from a file beside `beside`."""
        if file:
            return cls(file=Path(file))
        if environment.get(SECRET_VARIABLE):
            return cls(text=environment[SECRET_VARIABLE])
        whole = Path(os.path.abspath(beside))
        return cls(file=whole.with_name(f".{whole.name[:200]}.secret"), managed=True)

    def create(self) -> None:
        """On node 0: writes a fresh secret to the file where arriero manages it; else does nothing.

        Raises:
            UserError: it cannot be written.
        """
        if not self.managed or self.file is None:
            return
        make_directory(self.file.parent, SECRET_FIX)
        fresh = self.file.with_name(f"{self.file.name}.{os.getpid()}.tmp")
        try:
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(handle, "w", encoding="ascii") as writing:
                writing.write(secrets.token_hex(32) + "\n")
            os.replace(fresh, self.file)
        except OSError as error:
            raise UserError(
                f"the run's secret {escape(self.file)} cannot be written: {os_error_text(error)}", SECRET_FIX
            ) from None

    def key(self) -> bytes:
        """The secret, as the key of an HMAC.

        Raises:
            SecretMissing: its file does not exist.
            UserError: the file cannot be read, others can read or write it, or it is too short or too long.
        """
        if self.file is None:
            return _validated(self.text.encode("utf-8", "surrogateescape"), SECRET_VARIABLE)
        name = escape(self.file)
        try:
            handle = open_regular(self.file, follow=not self.managed)
            with open(handle, "rb") as reading:
                self._check_access(os.fstat(handle), name)
                return _validated(reading.read(MAX_BYTES + 1), name)
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                os.listdir(self.file.parent)  # makes a network file system refresh before the next try
            whose = ", which node 0 writes beside the run directory," if self.managed else ""
            raise SecretMissing(f"the run's secret {name}{whose} is not on this machine", SECRET_FIX) from None
        except (OSError, ValueError) as error:
            raise UserError(f"the secret {name} cannot be read: {os_error_text(error)}", SECRET_FIX) from None

    def _check_access(self, found: os.stat_result, name: str) -> None:
        mode = stat.S_IMODE(found.st_mode)
        if self.managed and (found.st_uid != os.geteuid() or mode & 0o077):
            raise UserError(f"the secret {name} is not this user's alone (mode {mode:03o})", SECRET_FIX)
        if mode & 0o027:  # a user's own file may be readable by a group, as Kubernetes mounts it
            raise UserError(f"others can read or change the secret {name} (mode {mode:03o})", f"chmod 600 {name}")

    def remove(self) -> None:
        """Removes the file that arriero has created."""
        if self.managed and self.file is not None:
            with contextlib.suppress(OSError):
                self.file.unlink()


def _validated(key: bytes, name: str) -> bytes:
    key = key.strip()
    if not MIN_BYTES <= len(key) <= MAX_BYTES:
        fix = "make one with: head -c 32 /dev/urandom | base64"
        raise UserError(f"the secret in {name} has {len(key)} bytes, not {MIN_BYTES} to {MAX_BYTES}", fix)
    return key
