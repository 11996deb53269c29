"""Record tests/machines/*.json: `python -m tests.machines.make`, from real scans of sandbox disks.

The looks are real; only what an image file can't have (model, serial number, device names, the host) is dressed up.
"""

import tempfile
from pathlib import Path

import msgspec

from cos_console.host.recorded import record
from cos_console.host.scan import scan
from cos_console.model.machine import BootedFrom, Disk, Machine
from tests.sandbox.disk import Recipe, make_disk
from tests.sandbox.tree import Derivative

HERE = Path(__file__).parent
_MODELS = (("sda", "SAMSUNG MZ7LH480", "S45PNA0M1847"), ("sdb", "INTEL SSDSC2KB48", "PHYF930200LD"))
_EMPTY = Recipe(active=None, passive=None, recovery=None)


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        for name, recipes in machines().items():
            record(look(Path(tmp), recipes), HERE / f"{name}.json")


def machines() -> dict[str, tuple[Recipe, ...]]:
    healthy = Recipe(active=Derivative("0.5.3"), passive=Derivative("0.5.2"), recovery=Derivative("0.5.2"))
    replace = _replace
    harvester = {"layout": "harvester"}
    return {
        "healthy": (healthy,),
        "broken-active": (replace(healthy, active=Derivative("0.5.3", kernel=False)),),
        "two-disks": (
            replace(healthy, active=Derivative("0.5.3", kernel=False)),
            replace(healthy, active=Derivative("0.6.4"), passive=Derivative("0.6.3")),
        ),
        "interrupted": (
            replace(
                healthy,
                active=None,
                labels={"passive": "COS_ACTIVE"},
                state_files={"cOS/transition.img": b"\0" * 4096},
            ),
        ),
        "harvester": (
            Recipe(
                active=Derivative("1.1.2", **harvester),
                passive=Derivative("1.1.1", **harvester),
                recovery=Derivative("1.1.1", **harvester),
                layout="harvester",
                oem_files={"harvester.config": b"{}\n"},
            ),
        ),
        "unhandled-v2": (
            replace(
                healthy, active=None, passive=None, state_files={".snapshots/1/snapshot.img": b"x" * 4096}
            ),
        ),
        "no-installation": (),
    }


def look(tmp: Path, recipes: tuple[Recipe, ...]) -> Machine:
    """One machine with a disk for each recipe."""
    parts: list[Machine] = []
    for (name, model, serial), recipe in zip(_MODELS, recipes, strict=False):
        path = tmp / f"{name}.img"
        make_disk(path, recipe)
        parts.append(_dress(scan(path), name, model, serial))
        path.unlink()
    if not parts:
        path = tmp / "blank.img"
        path.write_bytes(bytes(4 << 20))
        parts.append(_dress(scan(path), *_MODELS[0]))
        path.unlink()
    return msgspec.structs.replace(
        parts[0],
        scanned_at="2026-01-02T20:41:00Z",
        hostname="srv-07",
        product="PowerEdge R640",
        serial="5XG0RQ2",
        booted_from=BootedFrom.LIVECD,
        firmware="efi",
        architecture="amd64",
        disks=tuple(d for m in parts for d in m.disks),
        installations=tuple(i for m in parts for i in m.installations),
    )


def _dress(machine: Machine, name: str, model: str, serial: str) -> Machine:
    def dressed(disk: Disk) -> Disk:
        return msgspec.structs.replace(
            disk,
            path=f"/dev/{name}",
            name=name,
            model=model,
            serial=serial,
            is_image_file=False,
            partitions=tuple(
                msgspec.structs.replace(p, device=f"/dev/{name}{p.number}") for p in disk.partitions
            ),
        )

    return msgspec.structs.replace(
        machine,
        disks=tuple(dressed(d) for d in machine.disks),
        installations=tuple(msgspec.structs.replace(i, disk=dressed(i.disk)) for i in machine.installations),
    )


def _replace(recipe: Recipe, **changes: object) -> Recipe:
    import dataclasses

    return dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
