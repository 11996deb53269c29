"""Extended attributes as ext4 stores them: behind the inode's fields, and in a block of their own.

Sources: Linux Documentation/filesystems/ext4/attributes.rst, fs/ext4/xattr.c (hashes, order), fs/ext4/acl.h:
a POSIX ACL has another form on disk (version 1, short entries) than in the attribute (version 2).
"""

import stat as stat_module
import struct
from typing import NamedTuple

from cos_console.formats.ext4.layout import BLOCK, EXTRA_INODE, INODE
from cos_console.formats.readat import FormatError

_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
_ACLS = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_MAGIC = struct.pack("<I", 0xEA020000)
_INODE_ROOM = INODE - 128 - EXTRA_INODE
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_BLOCK_HEADER = 32
_SHARED_MAX = 1024
_FIRST = {(6, b"selinux"): 0, (6, b"capability"): 1}
"""What is read at every access stands in the inode if anything does."""


class Packed(NamedTuple):
    """`inline` goes behind the inode's fields, `block` (4096 bytes or none) into a block of its own."""

    inline: bytes
    block: bytes
    mode: int
    """The inode's mode: an access ACL decides its permission bits, as setting one does."""
    dropped: tuple[bytes, ...]
    """Names that no ext4 would take from a container runtime either."""


def pack(xattrs: dict[bytes, bytes], mode: int) -> Packed:
    """Attributes of an inode with `mode` (as st_mode). Raises FormatError when they can't be held."""
    entries: list[tuple[int, bytes, bytes]] = []
    dropped: list[bytes] = []
    kind = stat_module.S_IFMT(mode)
    for key, value in xattrs.items():
        if key in _ACLS:
            default = key == b"system.posix_acl_default"
            if kind == stat_module.S_IFLNK or (default and kind != stat_module.S_IFDIR):
                dropped.append(key)
                continue
            acl, permissions, says_more = _acl(value)
            if not default:
                mode = (mode & ~0o777) | permissions
            if default or says_more:
                entries.append((_ACLS[key], b"", acl))
            continue
        index, name = next(((i, key[len(p) :]) for p, i in _PREFIXES if key.startswith(p)), (0, b""))
        if not name or (index == 1 and kind not in {stat_module.S_IFREG, stat_module.S_IFDIR}):
            dropped.append(key)
        elif len(name) > 255:
            raise FormatError("an extended attribute with a name longer than 255 bytes")
        else:
            entries.append((index, name, value))
    entries.sort(key=lambda e: _FIRST.get((e[0], e[1]), 2))
    inside: list[tuple[int, bytes, bytes]] = []
    outside: list[tuple[int, bytes, bytes]] = []
    room = _INODE_ROOM - 4 - 4
    for entry in entries:
        need = 16 + _round(len(entry[1])) + _round(len(entry[2]))
        if need <= room:
            room -= need
            inside.append(entry)
        else:
            outside.append(entry)
    inline = _MAGIC + _body(inside, _INODE_ROOM - 4, 0) if inside else b""
    return Packed(inline, _block(outside) if outside else b"", mode, tuple(dropped))


def shared(block: bytes, references: int) -> bytes:
    """An attribute block that `references` inodes use."""
    return block[:4] + struct.pack("<I", references) + block[8:]


MAX_SHARED = _SHARED_MAX


def _block(entries: list[tuple[int, bytes, bytes]]) -> bytes:
    entries.sort(key=lambda e: (e[0], len(e[1]), e[1]))
    need = _BLOCK_HEADER + 4 + sum(16 + _round(len(n)) + _round(len(v)) for _, n, v in entries)
    if need > BLOCK:
        raise FormatError(f"{need} bytes of extended attributes; ext4 holds {BLOCK}")
    digest = 0
    for _, name, value in entries:
        digest = ((digest << 16) ^ (digest >> 16) ^ _hash(name, value)) & 0xFFFFFFFF
    header = struct.pack("<IIII", 0xEA020000, 1, 1, digest).ljust(_BLOCK_HEADER, b"\0")
    return header + _body(entries, BLOCK - _BLOCK_HEADER, _BLOCK_HEADER, hashed=True)


def _body(entries: list[tuple[int, bytes, bytes]], size: int, base: int, *, hashed: bool = False) -> bytes:
    """Entries from the front, values from the back; offsets count from `base` before the first entry."""
    head = b""
    values = b""
    for index, name, value in entries:
        values = value + bytes(-len(value) % 4) + values
        offset = base + size - len(values) if value else 0
        mark = _hash(name, value) if hashed else 0
        head += struct.pack("<BBHIII", len(name), index, offset, 0, len(value), mark)
        head += name + bytes(-len(name) % 4)
    return head + bytes(size - len(head) - len(values)) + values


def _hash(name: bytes, value: bytes) -> int:
    digest = 0
    for byte in name:
        digest = ((digest << 5) ^ (digest >> 27) ^ byte) & 0xFFFFFFFF
    for (word,) in struct.iter_unpack("<I", value + bytes(-len(value) % 4)):
        digest = ((digest << 16) ^ (digest >> 16) ^ word) & 0xFFFFFFFF
    return digest


def _acl(raw: bytes) -> tuple[bytes, int, bool]:
    """(Form on disk; the mode's permission bits; whether the ACL says more than they do)."""
    if len(raw) < 4 or raw[:4] != b"\x02\0\0\0" or (len(raw) - 4) % 8:
        raise FormatError("a POSIX ACL that is none")
    out = struct.pack("<I", 1)
    permissions = 0
    masked = named = False
    group = 0
    for tag, perm, owner in struct.iter_unpack("<HHI", raw[4:]):
        if tag not in {_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER} or perm > 7:
            raise FormatError("a POSIX ACL that is none")
        out += struct.pack("<HH", tag, perm)
        if tag in {_USER, _GROUP}:
            out += struct.pack("<I", owner)
            named = True
        elif tag == _USER_OBJ:
            permissions |= perm << 6
        elif tag == _OTHER:
            permissions |= perm
        elif tag == _MASK or not masked:
            group = perm
            masked = masked or tag == _MASK
    return out, permissions | group << 3, named or masked


def _round(length: int) -> int:
    return (length + 3) & ~3
