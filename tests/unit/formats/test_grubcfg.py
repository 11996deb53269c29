"""Installed grub.cfg files of each family, in our own words, and scripts that nobody should write."""

import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cos_console.formats.grubcfg import EnvironmentFile, parse_bootargs, parse_grub_cfg
from cos_console.formats.readat import FormatError
from tests.sandbox.grub import bootargs_cfg, grub_cfg

CHOOSE = """
if [ "${next_entry}" ]; then
  set default="${next_entry}"
  set selected_entry="${next_entry}"
  set next_entry=
  save_env -f "(${env_blk})${env_file}" next_entry
else
  set default="${saved_entry}"
fi
"""


def entries(name: str = "cOS", extra: str = "", *, find: str = "COS_STATE") -> str:
    recovery = """
  if [ -f /cOS/recovery.squashfs ]; then
    set img=/cOS/recovery.squashfs
    set recoverylabel=COS_RECOVERY
  else
    set img=/cOS/recovery.img
  fi"""
    text = ""
    for title, entry_id, label, img, image_label in (
        (name, "cos", find, "set img=/cOS/active.img", "COS_ACTIVE"),
        (f"{name} (fallback)", "fallback", find, "set img=/cOS/passive.img", "COS_PASSIVE"),
        (f"{name} recovery", "recovery", "COS_RECOVERY", recovery, "COS_SYSTEM"),
    ):
        text += f"""
menuentry "{title}" --class os --unrestricted --id {entry_id} {{
  search --no-floppy --label --set=root {label}
  {img}
  set label={image_label}
  loopback loop0 /$img
  set root=($root)
  source (loop0)/etc/cos/bootargs.cfg
  linux (loop0)$kernel $kernelcmd {extra}
  initrd (loop0)$initramfs
}}
"""
    return text


COS_053 = 'set timeout=10\nset default="${saved_entry}"\nset fallback="0 1 2"\ninsmod loopback\n' + entries()

COS_058 = (
    'set timeout=10\nset env_file="/grubenv"\nsearch --no-floppy --file --set=env_blk "${env_file}"\n'
    'if [ "${env_blk}" ]; then\n  load_env -f "(${env_blk})${env_file}"\nfi\n' + CHOOSE
    + 'set fallback="0 1 2"\nset gfxmode=auto; insmod all_video\n' + entries()
)  # fmt: skip

COS_073 = (
    'set oem_file="/grub_oem_env"\nsearch --file --set=oem_blk ${oem_file}\n'
    'if [ -n "$oem_blk" ]; then load_env -f "($oem_blk)$oem_file"; fi\n' + COS_058.partition("set fallback")[0]
    + 'if [ -z "${default_menu_entry}" ]; then set default_menu_entry="cOS"; fi\n'
    'if [ "${default_fallback}" ]; then set fallback="${default_fallback}"; else set fallback="0 1 2"; fi\n'
    + entries("${default_menu_entry}", "${extra_cmdline} ${extra_active_cmdline}")
    + 'search --no-floppy --file --set=menu_blk /grubmenu\n'
    'if [ "${menu_blk}" ]; then\n  source "(${menu_blk})/grubmenu"\nfi\n'
)  # fmt: skip

ELEMENTAL = (
    'set env_file="/grubenv"\nset oem_file=/grub_oem_env\n'
    'function choose {\n' + CHOOSE + "}\n"
    'load_env --file "${oem_file}"\nsearch --no-floppy --label --set env_blk "${oem_label}"\n'
    'if [ -f "(${env_blk})${env_file}" ]; then load_env -f "(${env_blk})${env_file}"; fi\n'
    'choose\nset fallback="0 1 2"\n'
    + entries("${default_menu_entry}", "${third_party_kernel_args}", find="${state_label}")
    + 'if [ -f "(${env_blk})/grubcustom" ]; then source "(${env_blk})/grubcustom"; fi\n'
)  # fmt: skip

KAIROS = COS_073.replace("search --no-floppy --file --set=menu_blk", 'set bad="a\\"b"\nsearch --no-floppy --file --set=menu_blk') + (
    'if [ "$reset" = "yes" ]; then\nmenuentry "state reset" --id statereset { set img=/cOS/recovery.img\n true\n}\nfi\n'
)  # fmt: skip

FAMILIES = {"0.5.3": COS_053, "0.5.8": COS_058, "0.7.3": COS_073, "elemental": ELEMENTAL, "kairos": KAIROS}


@pytest.mark.parametrize("text", FAMILIES.values(), ids=FAMILIES)
def test_the_samples_are_scripts_to_grub_itself(tmp_path: Path, text: str) -> None:
    (tmp_path / "grub.cfg").write_text(text)
    subprocess.run(["grub-script-check", tmp_path / "grub.cfg"], check=True)


@pytest.mark.parametrize("text", FAMILIES.values(), ids=FAMILIES)
def test_each_family_has_three_slots_in_order(text: str) -> None:
    config = parse_grub_cfg(text.encode())
    assert [e.entry_id for e in config.entries][:3] == ["cos", "fallback", "recovery"]
    active, passive, recovery = config.entries[:3]
    assert (active.image, active.label) == ("/cOS/active.img", "COS_ACTIVE")
    assert (passive.image, passive.label) == ("/cOS/passive.img", "COS_PASSIVE")
    assert recovery.images == ("/cOS/recovery.squashfs", "/cOS/recovery.img")
    assert recovery.image == ""
    assert recovery.root_label == "COS_RECOVERY"
    assert active.bootargs == "/etc/cos/bootargs.cfg"
    assert active.kernel_line.startswith("(loop0)${kernel} ${kernelcmd}")
    assert config.fallback == ("0", "1", "2")
    assert config.unknown == ()


def test_cos_053_reads_no_environment() -> None:
    config = parse_grub_cfg(COS_053.encode())
    assert not config.reads_environment
    assert not config.honours_next_entry
    assert config.environment_files == ()


def test_cos_058_reads_the_first_grubenv_and_uses_next_entry_once() -> None:
    config = parse_grub_cfg(COS_058.encode())
    assert config.environment == (EnvironmentFile("grubenv", "file"),)
    assert config.reads_environment
    assert config.honours_next_entry
    assert config.clears_next_entry
    assert config.entries[0].title == "cOS"


def test_cos_073_loads_the_oem_file_first_and_sources_a_menu_last() -> None:
    config = parse_grub_cfg(COS_073.encode())
    assert config.environment_files == ("grub_oem_env", "grubenv")
    assert config.sourced == ("/grubmenu",)
    assert config.entries[0].title == "${default_menu_entry}"
    assert config.entries[1].title == "${default_menu_entry} (fallback)"


def test_elemental_finds_its_files_by_root_and_by_label() -> None:
    config = parse_grub_cfg(ELEMENTAL.encode())
    assert config.environment == (
        EnvironmentFile("grub_oem_env", "root"),
        EnvironmentFile("grubenv", "label", "${oem_label}"),
    )
    assert config.honours_next_entry
    assert config.honours_saved_entry
    assert config.entries[0].root_label == "${state_label}"
    assert config.sourced == ("/grubcustom",)


def test_an_entry_in_a_condition_is_marked() -> None:
    reset = parse_grub_cfg(KAIROS.encode()).entries[3]
    assert (reset.entry_id, reset.conditional) == ("statereset", True)


@pytest.mark.parametrize("layout", ["cos", "cos-0.5.3", "elemental-v1", "kairos", "harvester"])
def test_the_sandbox_files_are_understood_wholly(layout: str) -> None:
    config = parse_grub_cfg(grub_cfg(layout).encode())
    assert config.unknown == ()
    assert config.reads_environment == (layout != "cos-0.5.3")
    arguments = parse_bootargs(bootargs_cfg(layout).encode())
    assert (arguments.kernel, arguments.initramfs) == ("/boot/vmlinuz", "/boot/initrd")
    assert arguments.root_by_image_label == (layout not in {"elemental-v1", "harvester"})


def test_boot_arguments_are_put_together_and_filled() -> None:
    text = """
set kernel=/boot/vmlinuz
set initramfs=/boot/initrd
if [ -n "$recoverylabel" ]; then
  set kernelcmd="root=live:LABEL=$recoverylabel rd.live.dir=/ rd.live.squashimg=$img panic=5"
else
  set base="console=tty1 console=ttyS0"
  set kernelcmd="$base root=LABEL=$label cos-img/filename=$img panic=5"
fi
"""
    arguments = parse_bootargs(text.encode())
    assert arguments.unknown == ("kernelcmd: more than one value is possible",)
    plain = parse_bootargs(text.replace('"$recoverylabel"', '""').encode())
    assert plain.unknown == ()
    assert plain.root_by_image_label
    assert plain.filled({"label": "COS_ACTIVE", "img": "/cOS/active.img"}) == (
        "console=tty1 console=ttyS0 root=LABEL=COS_ACTIVE cos-img/filename=/cOS/active.img panic=5"
    )


@pytest.mark.parametrize("text", [
    "", "set timeout=1\n", "menuentry x {\n", "menuentry 'x", "if [ a ]; then\nset a=b\n", "}\n",
    "if [ a ]; then\n" * 50,
])  # fmt: skip
def test_what_is_no_menu_is_a_format_error(text: str) -> None:
    with pytest.raises(FormatError):
        parse_grub_cfg(text.encode())


def test_loops_and_submenus_are_named_as_unknown() -> None:
    config = parse_grub_cfg(
        b"for x in a b; do\nset default=$x\ndone\nsubmenu more { menuentry a { true } }\nmenuentry b { true }\n"
    )
    assert any(u.startswith("for") for u in config.unknown)
    assert any(u.startswith("submenu") for u in config.unknown)
    assert len(config.entries) == 2


def test_a_function_that_calls_itself_ends() -> None:
    config = parse_grub_cfg(b"function f {\nf\nf\n}\nmenuentry a { true }\n" + b"f\n")
    assert config.unknown


pieces = st.sampled_from([
    "menuentry", "if", "then", "fi", "else", "elif", "{", "}", "[", "]", "set", "a=$b", "b=$a$a", '"', "'", "$", "${", "\\",
    "load_env", "-f", "(${r})/x", "search", "--set", "--set=r", "--label", "function", "f", ";", "\n", "--id", '""', "!", "-z",
    "default=${next_entry}", "save_env", "source", "linux", "unset", "=", "#", "|",
])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(pieces, max_size=40).map(" ".join) | st.text(max_size=60))
def test_any_script_is_read_or_refused_quickly(text: str) -> None:
    started = time.monotonic()
    for parse in (parse_grub_cfg, parse_bootargs):
        try:
            parse(b"menuentry a { true }\n" + text.encode())
        except FormatError:
            pass
    assert time.monotonic() - started < 1
