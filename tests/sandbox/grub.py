"""Boot loader configuration of a sandbox disk, in the forms that installed systems have.

Our own wording of what cos-toolkit's grub.cfg does at 0.5.3 (no environment), 0.7.x (first /grubenv found)
and in Elemental v1 (/grub_oem_env on COS_STATE names the OEM label; roots are found by file name).
"""

_CHOOSE = """\
if [ "${next_entry}" ]; then
  set default="${next_entry}"
  set selected_entry="${next_entry}"
  set next_entry=
  save_env -f "(${env_blk})/grubenv" next_entry
else
  set default="${saved_entry}"
fi

if [ "${default_fallback}" ]; then
  set fallback="${default_fallback}"
else
  set fallback="0 1 2"
fi
"""

_COS_07_ENV = """\
search --no-floppy --file --set=oem_blk /grub_oem_env
if [ "${oem_blk}" ]; then
  load_env -f "(${oem_blk})/grub_oem_env"
fi

search --no-floppy --file --set=env_blk /grubenv
if [ "${env_blk}" ]; then
  load_env -f "(${env_blk})/grubenv"
fi
"""

_ELEMENTAL_ENV = """\
load_env -f /grub_oem_env
search --no-floppy --label --set=env_blk "${oem_label}"
if [ "${env_blk}" ]; then
  load_env -f "(${env_blk})/grubenv"
fi
"""


def _entry(title: str, entry_id: str, state: str, img: str, label: str, extra: str) -> str:
    return f"""\
menuentry "{title}" --id {entry_id} {{
  search --no-floppy --label --set=root {state}
  set img=/cOS/{img}
  set label={label}
  loopback loop0 /$img
  set root=($root)
  source (loop0)/etc/cos/bootargs.cfg
  linux (loop0)$kernel $kernelcmd ${{extra_cmdline}} ${{{extra}}}
  initrd (loop0)$initramfs
}}
"""


def grub_cfg(layout: str, *, recovery_file: str = "recovery.img") -> str:
    """The installed grub.cfg. `layout` is cos, cos-0.5.3, elemental-v1, kairos or harvester."""
    head = "set timeout=10\nset gfxmode=auto\ninsmod all_video\ninsmod loopback\ninsmod squash4\n\n"
    if layout == "cos-0.5.3":
        choose = 'set default="${saved_entry}"\nset fallback="0 1 2"\n'
    elif layout in {"elemental-v1", "harvester"}:
        choose = _ELEMENTAL_ENV + _CHOOSE
    else:
        choose = _COS_07_ENV + _CHOOSE
    title = 'if [ -z "${default_menu_entry}" ]; then\n  set default_menu_entry="cOS"\nfi\n\n'
    entries = [
        _entry(
            "${default_menu_entry}", "cos", "COS_STATE", "active.img", "COS_ACTIVE", "extra_active_cmdline"
        ),
        _entry(
            "${default_menu_entry} (fallback)",
            "fallback",
            "COS_STATE",
            "passive.img",
            "COS_PASSIVE",
            "extra_passive_cmdline",
        ),
        _entry(
            "${default_menu_entry} recovery",
            "recovery",
            "COS_RECOVERY",
            recovery_file,
            "COS_SYSTEM",
            "extra_recovery_cmdline",
        ),
    ]
    return head + choose + title + "\n".join(entries)


def bootargs_cfg(layout: str) -> str:
    """/etc/cos/bootargs.cfg, which belongs to the image."""
    if layout in {"elemental-v1", "harvester"}:
        root = "root=LABEL=$state_label cos-img/filename=$img"
    else:
        root = "root=LABEL=$label cos-img/filename=$img"
    return (
        "set kernel=/boot/vmlinuz\n"
        "set initramfs=/boot/initrd\n"
        f'set kernelcmd="console=tty1 console=ttyS0 {root} panic=5 rd.neednet=1"\n'
    )


def environment_block(variables: dict[str, str]) -> bytes:
    """A GRUB environment block of 1024 bytes (GRUB's envblk: signature, name=value lines, '#' padding)."""
    body = "# GRUB Environment Block\n" + "".join(f"{k}={v}\n" for k, v in variables.items())
    return body.encode().ljust(1024, b"#")
