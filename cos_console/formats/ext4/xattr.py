"""Extended attributes of ext2/3/4, behind the inode and in a block of their own.

Source: Linux Documentation/filesystems/ext4/attributes.rst; ACLs: fs/ext4/acl.h (on disk) and
include/uapi/linux/posix_acl_xattr.h (what getxattr gives, and what is given here).
"""

import struct
from collections.abc import Callable

from cos_console.formats.readat import FormatError

_MAGIC = 0xEA020000
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
    7: b"system.",
    8: b"system.richacl",
}
_NAMED_IDS = {2, 8}
"""ACL tags that carry an id: a named user, a named group."""


def inode_attributes(raw: bytes, value_of: Callable[[int], bytes]) -> dict[bytes, bytes]:
    """Those in the inode's own space. `value_of` reads a value kept in another inode (ea_inode)."""
    if len(raw) < 132:
        return {}
    first = 128 + int(struct.unpack_from("<H", raw, 128)[0])
    if first + 4 > len(raw) or struct.unpack_from("<I", raw, first)[0] != _MAGIC:
        return {}
    return _entries(raw[first + 4 :], 0, value_of)


def block_attributes(block: bytes, value_of: Callable[[int], bytes]) -> dict[bytes, bytes]:
    if struct.unpack_from("<I", block, 0)[0] != _MAGIC:
        raise FormatError("an attribute block without its magic number")
    return _entries(block, 32, value_of)


def _entries(area: bytes, at: int, value_of: Callable[[int], bytes]) -> dict[bytes, bytes]:
    """Entries from `at`; the places of values count from the start of `area`."""
    found: dict[bytes, bytes] = {}
    while at + 16 <= len(area) and area[at : at + 4] != bytes(4):
        name_length, index, place, inode, size, _ = struct.unpack_from("<BBHIII", area, at)
        name = area[at + 16 : at + 16 + name_length]
        if index not in _PREFIXES or len(name) < name_length:
            raise FormatError("an extended attribute that can't be")
        if inode:
            value = value_of(inode)
        else:
            value = area[place : place + size]
        if len(value) != size:
            raise FormatError("an extended attribute's value lies outside its space")
        found[_PREFIXES[index] + name] = _posix_acl(value) if index in {2, 3} else value
        at += 16 + (name_length + 3 & ~3)
    return found


def _posix_acl(raw: bytes) -> bytes:
    if len(raw) < 4 or struct.unpack_from("<I", raw, 0)[0] != 1:
        raise FormatError("an access control list of unknown version")
    out = bytearray(struct.pack("<I", 2))
    at = 4
    while at + 4 <= len(raw):
        tag, permissions = struct.unpack_from("<HH", raw, at)
        at += 4
        identity = 0xFFFFFFFF
        if tag in _NAMED_IDS:
            if at + 4 > len(raw):
                raise FormatError("an access control list that is cut short")
            (identity,) = struct.unpack_from("<I", raw, at)
            at += 4
        out += struct.pack("<HHI", tag, permissions, identity)
    return bytes(out)
