"""Contexts as the image writer computes them, held against setfiles on a kernel mount, file by file."""

import os
from pathlib import Path

import pytest

from tests.disk.conftest import Run
from tests.sandbox.disk import SandboxDisk, run
from tests.sandbox.image import make_derivative_image
from tests.sandbox.tree import Derivative

pytestmark = pytest.mark.disk
FILE_CONTEXTS = rb"""
# a small policy with every construct of file_contexts(5)
/.*                              system_u:object_r:default_t:s0
/               -d               system_u:object_r:root_t:s0
/usr(/.*)?                       system_u:object_r:usr_t:s0
/usr/(.*/)?bin(/.*)?             system_u:object_r:bin_t:s0
/usr/lib(/.*)?                   system_u:object_r:lib_t:s0
/usr/lib/os-release     --       system_u:object_r:etc_t:s0
/etc(/.*)?                       system_u:object_r:etc_t:s0
/etc/motd.*             --       system_u:object_r:motd_t:s0
/etc/os-release         -l       system_u:object_r:link_t:s0
/boot(/.*)?                      system_u:object_r:boot_t:s0
/boot/vmlinuz-[0-9.]+   --       system_u:object_r:kernel_t:s0
/boot/initrd(-.*)?               system_u:object_r:initrd_t:s0
/usr/share/data/0[0-4]\d\.bin    system_u:object_r:data_t:s0:c0.c3
/usr/share/data/01[0-9]\.bin     -d      system_u:object_r:wrong_t:s0
/usr/share/data/02?5\.bin        --      system_u:object_r:optional_t:s0
/usr/share/data/003\.bin         --      system_u:object_r:exact_t:s0
/usr/share/data/00{2}\.bin               system_u:object_r:braces_t:s0
/tmp            -d               system_u:object_r:tmp_t:s0
/proc(/.*)?                      <<none>>
/sys(/.*)?                       <<none>>
/run/.*                          <<none>>
/var/lib(/.*)?                   system_u:object_r:var_lib_t:s0
/opt/sub/[^/]+/x                 system_u:object_r:sub_t:s0
/(lib|lib64)(/.*)?               system_u:object_r:liblink_t:s0
/home/[^/]+     -d               system_u:object_r:user_home_dir_t:s0
/srv/web\+one(/.*)?              system_u:object_r:web_t:s0
/srv/first(/.*)?|/srv/second     system_u:object_r:either_t:s0
"""
POLICY = {
    "etc/selinux/config": b"# which\nSELINUX=enforcing\nSELINUXTYPE=sandbox\n",
    "etc/selinux/sandbox/contexts/files/file_contexts": FILE_CONTEXTS,
    "etc/selinux/sandbox/contexts/files/file_contexts.homedirs": b"/root(/.*)? staff_u:object_r:home_t:s0\n",
    "etc/selinux/sandbox/contexts/files/file_contexts.local": b"/etc/hostname -- system_u:object_r:local_t:s0\n",
    "etc/selinux/sandbox/contexts/files/file_contexts.subs_dist": b"/opt/alias /var/lib\n/usr/local/lib /usr/lib\n",
    "etc/selinux/sandbox/contexts/files/file_contexts.subs": b"/opt/second /opt/alias\n",
}
FILES = {
    "opt/alias/deep/file": b"1", "opt/alias2/file": b"2", "opt/second/file": b"3", "opt/sub/a/x": b"4",
    "opt/sub/a/b/x": b"5", "usr/local/lib/x.so": b"6", "usr/local/bin/tool": b"7", "root/.profile": b"8",
    "home/user/file": b"9", "srv/web+one/index": b"10", "srv/webbone/index": b"11", "srv/first/a": b"12",
    "srv/second": b"13", "etc/name with blanks": b"14", "etc/motd.d/x": b"15", "usr/sbin/a/bin/b": b"16",
    "usr/share/data/05.bin": b"17", "tmp/inside": b"18",
}  # fmt: skip


def contexts(root: Path) -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for base, directories, files in os.walk(root):
        for name in [*directories, *files, "."]:
            path = Path(base, name)
            try:
                found[str(path.relative_to(root))] = os.getxattr(
                    path, "security.selinux", follow_symlinks=False
                )
            except OSError:
                found[str(path.relative_to(root))] = None
    return found


def strip(root: Path) -> None:
    for name, context in contexts(root).items():
        path = root / name
        if context is not None and "security.selinux" in os.listxattr(
            path, follow_symlinks=False
        ):  # once a file
            os.removexattr(path, "security.selinux", follow_symlinks=False)


def active(disk: SandboxDisk, work: Path) -> Path:
    part = disk.read_partition("COS_STATE", work / "state.part")
    image = work / "active.img"
    image.write_bytes(run(["grub-fstest", part, "cat", "--", "(loop0)/cOS/active.img"]))
    run(["e2fsck", "-fn", image])
    return image


def test_every_file_has_the_context_that_setfiles_gives_it(
    console: Run, disk: SandboxDisk, tmp_path: Path
) -> None:
    derivative = Derivative("2.0", payload_mib=0, extra={**POLICY, **FILES})
    image = make_derivative_image(tmp_path / "image", derivative)
    done = console("upgrade", image.reference, "--target", disk.path, "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    mounted = tmp_path / "mnt"
    mounted.mkdir()
    run(["mount", "-o", "loop", active(disk, tmp_path), mounted])
    try:
        ours = contexts(mounted)
        strip(mounted)
        assert set(contexts(mounted).values()) == {None}
        spec = mounted / "etc/selinux/sandbox/contexts/files/file_contexts"
        run(["setfiles", "-m", "-F", "-r", mounted, spec, mounted])
        theirs = contexts(mounted)
    finally:
        run(["umount", mounted])
    assert {n: (ours[n], theirs[n]) for n in theirs if ours[n] != theirs[n]} == {}
    assert len(theirs) > 100
    given = {c.split(b":")[2] for c in theirs.values() if c}
    assert len(given) > 20, given
    assert None in theirs.values()


def test_without_a_policy_nothing_is_labelled(console: Run, disk: SandboxDisk, tmp_path: Path) -> None:
    image = make_derivative_image(tmp_path / "image", Derivative("2.0", payload_mib=0))
    assert console("upgrade", image.reference, "--target", disk.path, "--yes").returncode == 0
    mounted = tmp_path / "mnt"
    mounted.mkdir()
    run(["mount", "-o", "loop,ro", active(disk, tmp_path), mounted])
    try:
        assert set(contexts(mounted).values()) == {None}
    finally:
        run(["umount", mounted])


def test_a_policy_that_cannot_be_read_is_refused_and_nothing_is_changed(
    console: Run, disk: SandboxDisk, tmp_path: Path
) -> None:
    for bad in (b"/.* system_u:object_r:b_t:s0\n/x(  system_u:object_r:a_t:s0\n", b"/x -q what is this\n"):
        policy = {**POLICY, "etc/selinux/sandbox/contexts/files/file_contexts": bad, "x(": b""}
        image = make_derivative_image(
            tmp_path / str(len(bad)), Derivative("2.0", payload_mib=0, extra=policy)
        )
        done = console("upgrade", image.reference, "--target", disk.path, "--yes")
        assert done.returncode == 6, done.stdout
        assert "COS-SELINUX" in done.stdout + done.stderr
        assert '"1.0"' in console("status", "--json", "--target", disk.path).stdout
