"""A new image becomes active; which of the old ones is kept as passive."""

from cos_console.model.image import ResolvedImage, Transport
from cos_console.model.machine import Finding, SlotName, SlotState
from cos_console.model.plan import Plan, SlotChange, SpacePhase, Step, StepKind
from cos_console.model.problem import ExitCode
from cos_console.planner import space
from cos_console.planner.given import CHECK, CLEAN, NEW_IMAGE, WRITE_BPS, Given
from cos_console.planner.words import disk, refused, version, warning, what
from cos_console.slots.keep import choose_keep


def plan_upgrade(given: Given) -> Plan:
    """Raises Problem: no image, no room."""
    image, inst = given.image, given.inst
    if image is None:
        raise refused("COS-USAGE", "No image was named.", "Name the image to upgrade to.", ExitCode.USAGE)
    keep = given.request.keep or choose_keep(inst)
    keeps_active = keep is SlotName.ACTIVE
    gives_up = given.request.remove_passive_first
    if gives_up:
        _may_give_up_passive(given, keep)
    room = space.room(inst, without_passive=gives_up)
    size, estimated = space.image_size(
        asked=given.request.image_size_bytes,
        unpacked=image.unpacked_bytes,
        transfer=image.transfer_bytes,
        configured=given.settings.image_size_bytes,
        room=room,
    )
    beside = "new image beside active" if gives_up else "new image beside active and passive"
    phase = SpacePhase(
        phase=beside, where="COS_STATE", needed_bytes=size, available_bytes=room, estimated=estimated
    )
    space.must_fit((phase,), more="" if gives_up else _offer(given, keep, size))
    old_active, old_passive, new = what(given.active), what(given.passive), image.version or "new image"
    network = image.reference.transport is Transport.DOCKER
    if gives_up:
        fate = (
            f"passive {old_passive} is removed first; today's active {old_active} becomes passive at the end"
        )
    elif keeps_active:
        fate = f"passive {old_passive} is replaced by today's active {old_active}"
    else:
        fate = f"passive {old_passive} stays; active {old_active} is replaced"
    return given.assemble(
        title=f"Upgrade {disk(inst)} from {old_active} to {new}",
        steps=_steps(image, size, network=network, gives_up=gives_up),
        changes=[
            SlotChange(slot=SlotName.ACTIVE, now=old_active, after=new),
            SlotChange(
                slot=SlotName.PASSIVE,
                now=old_passive,
                after=what(given.active if keeps_active else given.passive),
                note="" if keeps_active else _why_passive_stays(given),
            ),
        ],
        boots_after=given.outlook(
            SlotName.ACTIVE, SlotName.PASSIVE if given.request.try_once else SlotName.ACTIVE
        ),
        space=(phase,),
        fate=fate,
        undo=f"swap back to {what(given.active if keeps_active else given.passive)} at any time",
        warnings=_warnings(given, image, keep),
        keep=keep,
        image_size=size,
        estimate=2
        + (image.transfer_bytes / (given.settings.network_bps if network else WRITE_BPS))
        + size / WRITE_BPS / 3,
        from_version=version(given.active),
        to_version=image.version,
    )


def _steps(image: ResolvedImage, size: int, *, network: bool, gives_up: bool) -> list[Step]:
    reserve = Step(kind=StepKind.RESERVE, title="Space reserved", writes=NEW_IMAGE, size_bytes=size)
    if gives_up:
        reserve = Step(
            kind=StepKind.RESERVE,
            title="Passive removed, space reserved",
            writes=f"COS_STATE:/cOS/passive.img (removed), {NEW_IMAGE}",
            size_bytes=size,
            undo="none for passive: it is gone",
        )
    return [
        CHECK,
        Step(kind=StepKind.TRUST, title="Signature: not checked", writes=""),
        reserve,
        Step(
            kind=StepKind.FETCH,
            title="Download and write" if network else "Read and write",
            writes=NEW_IMAGE,
            size_bytes=image.transfer_bytes or None,
            undo="the new image is removed, nothing else was touched",
        ),
        Step(kind=StepKind.PROVE, title="Prove: read back every byte from disk", writes=""),
        Step(
            kind=StepKind.SWITCH,
            title="Switch",
            writes="names and labels in COS_STATE:/cOS, the GRUB environment",
            cancellable=False,
            undo="swap back",
        ),
        CLEAN,
    ]


def _warnings(given: Given, image: ResolvedImage, keep: SlotName | None) -> list[Finding]:
    found = [warning("COS-UNSIGNED", "signature: not checked (this release has no signature check yet)")]
    if given.request.remove_passive_first:
        found.append(
            warning(
                "COS-NO-FALLBACK-MEANWHILE",
                "Passive is given up first: until this is done there is no fallback but recovery.",
            )
        )
    if keep is None:
        found.append(
            warning(
                "COS-NO-FALLBACK",
                "Neither active nor passive is sound: there is no fallback until this is done.",
            )
        )
    if not given.inst.boot.reads_environment:
        found.append(
            warning(
                "COS-WINDOW",
                "This boot loader reads no environment: during the switch a power cut has a short window.",
            )
        )
    if given.active and image.version and image.version == given.active.version:
        found.append(warning("COS-SAME-VERSION", f"active is {image.version} already."))
    return found


def _may_give_up_passive(given: Given, keep: SlotName | None) -> None:
    """Only where active is sound and stays: what boots must not be what is removed. Raises Problem."""
    active, passive = given.active, given.passive
    if passive is None or passive.state is SlotState.MISSING:
        raise refused("COS-NOTHING", "There is no passive to give up.", "Upgrade without that wish.")
    if (
        keep is not SlotName.ACTIVE
        or active is None
        or active.state is not SlotState.SOUND
        or passive.running
    ):
        raise refused(
            "COS-KEEP-PASSIVE",
            "Passive is what this machine could still boot, so it is not given up.",
            "Free space on the state partition, or choose a smaller --size.",
        )


def _offer(given: Given, keep: SlotName | None, size: int) -> str:
    """The last way out, where it would help."""
    sound = given.active is not None and given.active.state is SlotState.SOUND
    if keep is SlotName.ACTIVE and sound and size <= space.room(given.inst, without_passive=True):
        return " Or give up the fallback for the time of the upgrade: --remove-passive-first."
    return ""


def _why_passive_stays(given: Given) -> str:
    if given.inst.running is SlotName.PASSIVE:
        return "kept, because this machine runs from it"
    if given.active is None or given.active.state is not SlotState.SOUND:
        return "kept, because active is broken"
    return "kept"
