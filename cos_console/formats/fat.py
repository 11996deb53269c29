"""Names in a FAT12/16/32 file system: enough to tell what an EFI system partition holds. Nothing is written.

Source: Microsoft's FAT specification (fatgen103): boot sector, cluster chains, short and long directory entries.
"""

from dataclasses import dataclass

from cos_console.formats.readat import FormatError, ReadAt

_MAX_CLUSTERS = 1024
_DIRECTORY, _VOLUME, _LONG = 0x10, 0x08, 0x0F


@dataclass(frozen=True)
class _Entry:
    name: str
    is_dir: bool
    cluster: int


class Fat:
    """An opened file system. Paths use `/`; names are compared without case."""

    def __init__(self, source: ReadAt) -> None:
        boot = source.read_at(0, 512)
        if len(boot) < 512 or boot[510:512] != b"\x55\xaa":
            raise FormatError("no FAT boot sector")
        self._source = source
        sector = int.from_bytes(boot[11:13], "little")
        per_cluster = boot[13]
        if sector not in {512, 1024, 2048, 4096} or per_cluster == 0 or per_cluster & (per_cluster - 1):
            raise FormatError("an impossible FAT geometry")
        reserved = int.from_bytes(boot[14:16], "little")
        copies = boot[16]
        root_entries = int.from_bytes(boot[17:19], "little")
        sectors = int.from_bytes(boot[19:21], "little") or int.from_bytes(boot[32:36], "little")
        fat_sectors = int.from_bytes(boot[22:24], "little") or int.from_bytes(boot[36:40], "little")
        root_sectors = -(-root_entries * 32 // sector)
        self._fat_at = reserved * sector
        self._root_at = (reserved + copies * fat_sectors) * sector
        self._root_bytes = root_sectors * sector
        self._data_at = self._root_at + self._root_bytes
        self._cluster_bytes = sector * per_cluster
        clusters = (sectors - self._data_at // sector) // per_cluster
        self._bits = 12 if clusters < 4085 else 16 if clusters < 65525 else 32
        self._root_cluster = int.from_bytes(boot[44:48], "little") if self._bits == 32 else 0

    def listdir(self, path: str = "/") -> tuple[str, ...]:
        """Names in a directory; empty when there is none. Raises FormatError, OSError."""
        data = self._root()
        for part in (p for p in path.split("/") if p):
            found = next((e for e in _entries(data) if e.name.lower() == part.lower() and e.is_dir), None)
            if found is None:
                return ()
            data = self._chain(found.cluster)
        return tuple(sorted(e.name for e in _entries(data)))

    def _root(self) -> bytes:
        if self._bits == 32:
            return self._chain(self._root_cluster)
        return self._source.read_at(self._root_at, self._root_bytes)

    def _chain(self, cluster: int) -> bytes:
        parts: list[bytes] = []
        end = {12: 0xFF7, 16: 0xFFF7, 32: 0xFFFFFF7}[self._bits]
        while 2 <= cluster < end:
            if len(parts) >= _MAX_CLUSTERS:
                raise FormatError("a FAT directory that does not end")
            parts.append(
                self._source.read_at(self._data_at + (cluster - 2) * self._cluster_bytes, self._cluster_bytes)
            )
            cluster = self._next(cluster)
        return b"".join(parts)

    def _next(self, cluster: int) -> int:
        if self._bits == 12:
            pair = int.from_bytes(self._source.read_at(self._fat_at + cluster * 3 // 2, 2), "little")
            return pair >> 4 if cluster & 1 else pair & 0xFFF
        size = self._bits // 8
        return (
            int.from_bytes(self._source.read_at(self._fat_at + cluster * size, size), "little") & 0x0FFFFFFF
        )


def _entries(data: bytes) -> list[_Entry]:
    found: list[_Entry] = []
    long_name: dict[int, str] = {}
    for at in range(0, len(data) - 31, 32):
        raw = data[at : at + 32]
        if raw[0] == 0:
            break
        if raw[0] == 0xE5:
            long_name = {}
            continue
        if raw[11] == _LONG:
            text = (raw[1:11] + raw[14:26] + raw[28:32]).decode("utf-16-le", "replace")
            long_name[raw[0] & 0x1F] = text.split("\0", 1)[0]
            continue
        if not raw[11] & _VOLUME:
            stem, extension = (raw[a:b].decode("cp437").rstrip() for a, b in ((0, 8), (8, 11)))
            name = "".join(long_name[n] for n in sorted(long_name)) or (
                f"{stem}.{extension}" if extension else stem
            )
            if name not in {".", ".."}:
                cluster = int.from_bytes(raw[20:22], "little") << 16 | int.from_bytes(raw[26:28], "little")
                found.append(_Entry(name, bool(raw[11] & _DIRECTORY), cluster))
        long_name = {}
    return found
