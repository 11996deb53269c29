"""The stream of `docker save`, read forwards once: layers handed out as they come, descriptions kept.

Sources: Docker image spec v1.2 (`ID/layer.tar`, `CONFIG.json`, `manifest.json`; equal layers are symbolic links
to the first) and OCI image-layout.md, which engines from 25 on write (`blobs/sha256/…`; with containerd's store
the layers there are compressed). The order of members is the engine's own: what a member is, is told by its
name or its first bytes. Tar headers are read with the standard library (POSIX.1-2001 pax, GNU).
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator

from cos_console.model.image import Digest

_BLOCK = 512
_DESCRIPTION_LIMIT = 8 << 20
_DESCRIPTIONS_LIMIT = 32 << 20
_HEADER_LIMIT = 1 << 20
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")


class SavedError(ValueError):
    """The stream is not what `docker save` writes, or ends too early."""


class SavedImage:
    """`next_layer` gives the layers; after the last one `described_by` knows every description seen."""

    def __init__(self, chunks: Iterator[bytes], diff_ids: frozenset[str]) -> None:
        self._chunks = chunks
        self._diff_ids = diff_ids
        self._chunk = memoryview(b"")
        self._left = 0
        """Of the current member's content."""
        self._padding = 0
        self._descriptions: dict[str, bytes] = {}
        self._described = 0

    def next_layer(self) -> "SavedLayer | None":
        """The next one, None after the last. Raises SavedError and what the chunks raise."""
        while (info := self._next_member()) is not None:
            if info.type not in {tarfile.REGTYPE, tarfile.AREGTYPE}:
                continue
            name = info.name.removeprefix("./")
            head = self._take(min(_BLOCK, self._left))
            if self._is_layer(name, head, info.size):
                return SavedLayer(self, head)
            if head[:1] in {b"{", b"["} and info.size <= _DESCRIPTION_LIMIT:
                self._keep(head + self._take(self._left))
        return None

    def described_by(self, identity: Digest) -> list[str] | None:
        """The diff_ids of the image that `identity` names, its configuration's digest or its manifest's.

        None when no description of that digest came: digests are computed here, not taken from names.
        """
        return self._diff_ids_of(identity, depth=0)

    def read_content(self, buffer: memoryview) -> int:
        """Into `buffer` from the current member; 0 at its end."""
        if not self._left:
            return 0
        piece = self._more()[: min(len(buffer), self._left)]
        buffer[: len(piece)] = piece
        self._advance(len(piece))
        self._left -= len(piece)
        return len(piece)

    def _diff_ids_of(self, digest: str, depth: int) -> list[str] | None:
        data = self._descriptions.get(digest)
        if data is None or depth > 3:
            return None
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(document, dict):
            return None
        root = document.get("rootfs")
        if isinstance(root, dict) and isinstance(root.get("diff_ids"), list):
            return [str(d) for d in root["diff_ids"]]
        inner = document.get("config")
        below = [inner] if isinstance(inner, dict) else document.get("manifests")
        for entry in below if isinstance(below, list) else []:
            found = (
                self._diff_ids_of(str(entry.get("digest")), depth + 1) if isinstance(entry, dict) else None
            )
            if found is not None and frozenset(found) == self._diff_ids:
                return found
        return None

    def _is_layer(self, name: str, head: bytes, size: int) -> bool:
        if name.endswith("/layer.tar") or f"sha256:{name.removeprefix('blobs/sha256/')}" in self._diff_ids:
            return True
        if not name.startswith("blobs/"):
            return False
        empty = size >= 2 * _BLOCK and len(head) == _BLOCK and not any(head)
        return head[257:262] == b"ustar" or head.startswith(_COMPRESSED) or empty

    def _keep(self, data: bytes) -> None:
        self._described += len(data)
        if self._described > _DESCRIPTIONS_LIMIT:
            raise SavedError("its descriptions are too large")
        self._descriptions[f"sha256:{hashlib.sha256(data).hexdigest()}"] = data

    def _next_member(self) -> tarfile.TarInfo | None:
        """Skip what is left of the current member; extension headers are applied."""
        self._skip(self._left + self._padding)
        self._left = self._padding = 0
        name = size = None
        while True:
            block = self._take(_BLOCK)
            if not any(block):
                self._drain()
                return None
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.TarError as e:
                raise SavedError(f"a header is damaged ({e})") from None
            if info.type in {
                tarfile.XHDTYPE,
                tarfile.GNUTYPE_LONGNAME,
                tarfile.GNUTYPE_LONGLINK,
                tarfile.XGLTYPE,
            }:
                if not 0 <= info.size <= _HEADER_LIMIT:
                    raise SavedError("an extension header is too large")
                data = self._take(info.size)
                self._skip(-info.size % _BLOCK)
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif info.type == tarfile.XHDTYPE:
                    records = pax_records(data)
                    name = records.get("path", name)
                    size = records.get("size", size)
                continue
            info.name = name if name is not None else info.name
            if size is not None:
                if not size.isdigit() or len(size) > 18:
                    raise SavedError("a size is no number")
                info.size = int(size)
            if info.size < 0:
                raise SavedError("a size is below zero")
            self._left, self._padding = info.size, -info.size % _BLOCK
            return info

    def _more(self) -> memoryview:
        """What is there of the stream, at least one byte."""
        while not len(self._chunk):
            try:
                self._chunk = memoryview(next(self._chunks))
            except StopIteration:
                raise SavedError("it ended too early") from None
        return self._chunk

    def _advance(self, count: int) -> None:
        self._chunk = self._chunk[count:]

    def _take(self, count: int) -> bytes:
        parts = []
        wanted = count
        while wanted:
            piece = bytes(self._more()[:wanted])
            self._advance(len(piece))
            parts.append(piece)
            wanted -= len(piece)
        self._left = max(0, self._left - count)
        return b"".join(parts)

    def _skip(self, count: int) -> None:
        while count:
            piece = len(self._more()[:count])
            self._advance(piece)
            count -= piece

    def _drain(self) -> None:
        """To the end of the stream, so that the connection ends well."""
        self._chunk = memoryview(b"")
        for _ in self._chunks:
            pass


class SavedLayer:
    """One layer's bytes; `head` was looked at already."""

    def __init__(self, saved: SavedImage, head: bytes) -> None:
        self._saved = saved
        self._head = head

    def readinto(self, buffer: memoryview) -> int:
        if self._head:
            count = min(len(buffer), len(self._head))
            buffer[:count] = self._head[:count]
            self._head = self._head[count:]
            return count
        return self._saved.read_content(buffer)


def pax_records(data: bytes) -> dict[str, str]:
    """`length key=value LF` records. Raises SavedError."""
    found: dict[str, str] = {}
    while data.strip(b"\0"):
        number, space, _ = data[:20].partition(b" ")
        if not space or not number.isdigit() or not len(number) + 3 <= int(number) <= len(data):
            raise SavedError("an extension header is damaged")
        key, equals, value = data[len(number) + 1 : int(number) - 1].partition(b"=")
        if not equals:
            raise SavedError("an extension header is damaged")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(number) :]
    return found
