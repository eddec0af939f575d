"""What tells a file's format: its first bytes, the names in its archive, and what its pickle would import."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from modelpress_compression.archive import Archive
from modelpress_compression.loaders.formats.pickle_scan import MAX_PICKLE_BYTES, scan_pickle
from modelpress_compression.loaders.formats.refusals import refused
from modelpress_compression.loaders.formats.torch_archive import inner_members

_HEAD_BYTES = 4096
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")
_PICKLE_MAGICS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# torch.save before version 1.6: magic number, protocol and system before the object; storage keys and tensors follow.
_LEGACY_PICKLES = 4
# What torch.save writes first in its old format, whatever the pickle's protocol: the long 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_MAGIC_WITHIN = 32
_WHAT = "The file's pickle"


class Content:
    """A file as the sniffers see it. Archive and pickle are read when first asked for; nothing in them is executed.

    Raises UnsupportedFormatError where something is damaged, RejectedModelError where it is built to deceive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = path.stat().st_size
        with path.open("rb") as file:
            self.head = file.read(_HEAD_BYTES)
        self.is_zip = self.head.startswith(_ZIP_MAGICS)

    @cached_property
    def names(self) -> frozenset[str]:
        """The archive's members, without the folder that every torch archive keeps them in; none of another file.

        In lower case, for torch does not tell the cases apart.
        """
        if not self.is_zip:
            return frozenset()
        with Archive.open(self.path) as archive:
            _refuse_arrays(archive)
            return frozenset(inner_members(archive))

    @property
    def of_torch(self) -> bool:
        """Whether torch.save wrote the pickle."""
        return self.is_zip or _LEGACY_MAGIC in self.head[:_LEGACY_MAGIC_WITHIN]

    @cached_property
    def imports(self) -> frozenset[str] | None:
        """Every `module name` that the pickle would import; None where the file holds none."""
        if self.is_zip:
            return self._archived_imports()
        return self._legacy_imports() if self.head.startswith(_PICKLE_MAGICS) else None

    def _archived_imports(self) -> frozenset[str] | None:
        if "data.pkl" not in self.names:
            return None
        with Archive.open(self.path) as archive:
            data = archive.read(inner_members(archive)["data.pkl"], MAX_PICKLE_BYTES)
        return scan_pickle(data, _WHAT).globals

    def _legacy_imports(self) -> frozenset[str]:
        with self.path.open("rb") as file:
            data = file.read(MAX_PICKLE_BYTES)
        found: frozenset[str] = frozenset()
        for _ in range(_LEGACY_PICKLES):
            scan = scan_pickle(data, _WHAT)
            found |= scan.globals
            data = data[scan.end :]
            if not data.startswith(_PICKLE_MAGICS):
                break
        return found


def _refuse_arrays(archive: Archive) -> None:
    """Data instead of a model is a common slip; said before anything is said about what torch would not write."""
    names = [member.name for member in archive.members]
    if names and all(name.endswith(".npy") for name in names):
        raise refused("ARRAYS")
