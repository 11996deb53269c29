"""The guard: GRUB's environment block, written in place.

Overwriting allocated bytes is not journaled, so GRUB and Linux see it at the same instant; a rename reaches
GRUB only with a checkpoint. Every copy that could win is written, each as one write, fsynced and read back.
"""

from cos_console.formats import grubenv
from cos_console.slots.port import Place, Port


def write(port: Port, places: tuple[Place, ...], changes: dict[str, str | None]) -> None:
    """Set (or unset, where None) these variables in each block. Raises OSError, FormatError (does not fit)."""
    for place in places:
        if port.stat(place) is None:
            _make(port, place)
        old = port.read(place, 0, grubenv.BLOCK_BYTES)
        new = grubenv.change(old, changes)
        sectors = grubenv.changed_sectors(old, new)
        if sectors:
            start = sectors[0] * grubenv.SECTOR_BYTES
            end = min((sectors[-1] + 1) * grubenv.SECTOR_BYTES, len(new))
            port.write_at(place, start, new[start:end])
        port.fsync_file(place)
        if port.read_back(place, 0, len(new)) != new:
            raise OSError(5, "the environment block does not read back as written", str(place))


def restore(port: Port, place: Place, block: bytes) -> None:
    """Write a block back as it was."""
    port.write_at(place, 0, block)
    port.fsync_file(place)


def _make(port: Port, place: Place) -> None:
    """A new block: temporary name, fsync, rename, checkpoint, so that no half of it is ever read."""
    temporary = place.beside(place.name + ".new")
    if port.stat(temporary) is not None:
        port.unlink(temporary)
    port.create(temporary)
    port.write_at(temporary, 0, grubenv.empty_block())
    port.fsync_file(temporary)
    port.rename(temporary, place)
    port.fsync_dir(place.directory)
    port.checkpoint(place.volume)
