"""Which of active and passive survives an upgrade: decided by what runs and what is sound, never by a label."""

from cos_console.model.machine import Installation, SlotName, SlotState


def choose_keep(installation: Installation) -> SlotName | None:
    """The slot whose image is kept as passive; None when neither is sound.

    What this machine runs from is kept (told by the loop device's inode): after an upgrade without a reboot
    that is passive, and the never-booted active is what a second upgrade replaces. From a LiveCD the sound
    slot is kept; of two sound ones the one that saved_entry names, else active.
    """
    running = installation.running
    if running in (SlotName.ACTIVE, SlotName.PASSIVE):
        return running
    sound = {s.name for s in installation.slots if s.state is SlotState.SOUND}
    candidates = [n for n in (SlotName.ACTIVE, SlotName.PASSIVE) if n in sound]
    if len(candidates) == 2 and installation.boot.saved_entry in {"fallback", "1"}:
        return SlotName.PASSIVE
    return candidates[0] if candidates else None
