"""Runs a command under a kernel with SocketCAN: this one if it has it, else a small guest's.

    python -m tools.guest -- pytest tests/bus            # on vcan0
    python -m tools.guest --kvaser -- pytest tests/bus   # can0 and can1: emulated controllers on one wire

The guest's root file system is the host's, read-only under a throw-away
overlay, so that a virtual environment works in it as it is; the working folder
is shared at the same path. Output and exit status come through. Without
`--kvaser` it is user-mode Linux: a process, Python at full speed, slow system
calls. With it, or with `--qemu`, it is an emulated machine: Python is a dozen
times slower and everything else slower too, so that only ratios mean anything.

The first run unpacks Debian's kernels into a cache, and installs Debian's
packages if it may. Where that cannot be, it says why and exits with 77.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import lzma
import os
import platform
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SKIPPED: Final = 77
"""Exit status if there can be no guest here."""
TIMED_OUT: Final = 124
BROKEN: Final = 125
"""Exit status if the guest ended without one of the command's."""
SHUTDOWN_S: Final = 5.0
"""Longest time, in seconds, that the guest may take to end after the command."""

CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "openfod-guest"
MEMORY_MIB: Final = 1024
_VCAN: Final = "vcan0"
_PAIR: Final = "can0,can1"

_CAN_MODULES: Final = ("can", "can-raw", "can-bcm", "vcan")
_QEMU_MODULES: Final = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")


class NoGuestError(Exception):
    """There can be no guest here; the text says why."""


@dataclass(frozen=True)
class Engine:
    """One way of running a guest.

    Args:
        packages: Debian's, besides a kernel.
        modules: loaded before the root file system is there.
        late_modules: loaded when the interfaces are made.
        mount: shell function that mounts a host's folder: tag, host path, mount point, ro or rw.
        ports: shell commands that set O, E and C to the devices for output, errors and control.
    """

    name: str
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    late_modules: tuple[str, ...]
    mount: str
    ports: str


UML: Final = Engine(
    "uml",
    ("user-mode-linux", "busybox-static", "kmod", "iproute2"),
    ("overlay", *_CAN_MODULES),
    (),
    'mount -t hostfs -o "$4,$2" none "$3"',
    "O=/dev/tty1 E=/dev/tty2 C=/dev/tty3; for t in $O $E $C; do stty raw -echo <$t; done",
)
QEMU: Final = Engine(
    "qemu",
    ("qemu-system-x86", "busybox-static", "kmod", "iproute2"),
    (*_QEMU_MODULES, *_CAN_MODULES),
    ("kvaser_pci",),
    'mount -t 9p -o "$4,trans=virtio,version=9p2000.L,cache=$([ $4 = ro ] && echo loose || echo mmap),'
    'msize=512000,access=any" "$1" "$3"',
    "for n in /sys/class/virtio-ports/vport*; do case $(cat $n/name) in "
    "out) O=/dev/${n##*/};; err) E=/dev/${n##*/};; ctl) C=/dev/${n##*/};; esac; done",
)

_FIRST_STAGE: Final = r"""#!/bin/busybox sh
# In the initial memory disk: builds the root, the host's under an overlay, and goes there.
/bin/busybox mkdir -p /bin /proc /sys /dev /lower /rw /new
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev 2>/dev/null
. /guest/conf
for m in $(cat /guest/order); do insmod $m; done
mount_host() { @MOUNT@; }
fail() { echo "guest: $*" >/dev/console; poweroff -f; }
mount_host root / /lower ro || fail "cannot mount the host's root"
mount -t tmpfs -o mode=755,size=80% tmpfs /rw; mkdir /rw/up /rw/wk
mount -t overlay -o lowerdir=/lower,upperdir=/rw/up,workdir=/rw/wk overlay /new || fail "no overlay"
mkdir -p /new/usr/lib/modules
cp -a /lib/modules/. /new/usr/lib/modules/
mount -t tmpfs -o mode=1777 tmpfs /new/tmp; mount -t tmpfs -o mode=755 tmpfs /new/run
mkdir -p /new/run/guest/bin /new/run/lock /new/dev /new/proc /new/sys
cp /guest/* /new/run/guest/; cp /bin/busybox /new/run/guest/bin/
mkdir -p "/new$SHARE"; mount_host share "$SHARE" "/new$SHARE" rw || fail "cannot mount $SHARE"
mount --move /proc /new/proc; mount --move /sys /new/sys; mount --move /dev /new/dev
exec switch_root /new /run/guest/bin/busybox sh /run/guest/second
"""

_SECOND_STAGE: Final = r"""# The first process on the final root.
. /run/guest/conf
B=/run/guest/bin; $B/busybox --install -s $B; PATH=$B
export HOME=/root TERM=dumb LANG=C.UTF-8
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -sf /proc/self/fd/${n%:*} /dev/${n#*:}; done
ip link set lo up
ip link add dev $VCAN type vcan && ip link set $VCAN mtu 72 && ip link set $VCAN up
for m in $LATE; do modprobe $m; done
if [ -n "$PAIR" ]; then
  for c in can0 can1; do  # not busybox's ip, which knows no bit rates
    /sbin/ip link set $c type can bitrate 500000 && /sbin/ip link set $c up ||
      echo "guest: no $c" >/dev/console
  done
fi
@PORTS@
exec 3>$C
cd "$SHARE"
mkfifo /run/guest/o /run/guest/e
cat /run/guest/o >$O & po=$!
cat /run/guest/e >$E & pe=$!
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  setsid /bin/sh /run/guest/command </dev/null >/run/guest/o 2>/run/guest/e 3>&-; rc=$?
n=0; while [ $n -lt 20 ] && { kill -0 $po || kill -0 $pe; } 2>/dev/null; do sleep 0.05; n=$((n+1)); done
echo "$rc" >&3
sync
sleep 0.05
/bin/busybox poweroff -f
"""


# --- what has to be there ----------------------------------------------------------


def prepare(engine: Engine) -> Path:
    """The folder with an engine's kernel and modules; made if it is not there.

    Raises:
        NoGuestError: it cannot be made here.
    """
    if platform.machine() != "x86_64" or shutil.which("dpkg-query") is None:
        raise NoGuestError("the guest's kernels are Debian's, for x86-64")
    missing = [name for name in engine.packages if not _is_installed(name)]
    if missing:
        if os.geteuid() != 0:
            raise NoGuestError(f"not root; needed: apt-get install {' '.join(missing)}")
        _apt("update", "-q")
        _apt("install", "-y", "-q", "--no-install-recommends", *missing)
    folder = CACHE / engine.name
    if not (folder / "order").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as made:
            new = Path(made) / "new"
            new.mkdir()
            if engine is UML:
                _pick_modules(Path("/usr/lib/uml"), new, engine)
            else:
                _unpack_kernel(Path(made), new, engine)
            with contextlib.suppress(OSError):  # another run was faster
                new.rename(folder)
    return folder


def _is_installed(package: str) -> bool:
    found = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status}", package],
        check=False,
        capture_output=True,
        text=True,
    )
    return found.stdout == "installed"


def _apt(*arguments: str) -> None:
    done = subprocess.run(
        ["apt-get", *arguments],
        check=False,
        stdout=sys.stderr,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    )
    if done.returncode:
        raise NoGuestError(f"apt-get {arguments[0]} failed")


def _unpack_kernel(work: Path, folder: Path, engine: Engine) -> None:
    """Debian's kernel, unpacked and not installed: no boot loader has to know of it."""
    depends = subprocess.run(
        ["apt-cache", "depends", "linux-image-amd64"], check=False, capture_output=True, text=True
    )
    package = next((w for w in depends.stdout.split() if w.startswith("linux-image-")), "")
    image = next((w for w in depends.stdout.split()[1:] if w.startswith("linux-image-")), package)
    fetched = subprocess.run(["apt-get", "download", "-q", image], check=False, cwd=work, stdout=sys.stderr)
    if fetched.returncode:
        raise NoGuestError(f"apt-get download {image} failed")
    (deb,) = work.glob("*.deb")
    subprocess.run(["dpkg", "-x", str(deb), str(work / "x")], check=True)
    (kernel,) = (work / "x" / "boot").glob("vmlinuz-*")
    (folder / "kernel").write_bytes(_uncompressed(kernel.read_bytes()))
    root = next(p for p in (work / "x/usr", work / "x") if (p / "lib/modules").is_dir())
    version = kernel.name.removeprefix("vmlinuz-")
    subprocess.run(["depmod", "-b", str(root), version], check=True)
    _pick_modules(root / "lib", folder, engine)


def _uncompressed(image: bytes) -> bytes:
    """The kernel itself: to unpack it in an emulation takes more than a second."""
    if (at := image.find(b"\xfd7zXZ\x00")) > 0:
        with contextlib.suppress(lzma.LZMAError):
            return lzma.LZMADecompressor().decompress(image[at:])
    if (at := image.find(b"\x1f\x8b\x08")) > 0:
        with contextlib.suppress(OSError, EOFError):
            return gzip.GzipFile(fileobj=io.BytesIO(image[at:])).read()
    return image


def _pick_modules(source: Path, folder: Path, engine: Engine) -> None:
    """Copies the modules that are loaded, with what they need, and writes in which order."""
    (modules,) = (source / "modules").iterdir()
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        file, _, others = line.partition(":")
        needs[_module_name(file)] = [*reversed(others.split()), file]
    target = folder / "root" / "lib" / "modules" / modules.name
    order: list[str] = []
    for name in (*engine.modules, *engine.late_modules):
        for file in needs.get(_module_name(name), ()):  # others are built in
            copy = target / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(_unsigned((modules / file).read_bytes()))
            if name in engine.modules and file not in order:
                order.append(file)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        if (modules / name).exists():
            shutil.copy(modules / name, target / name)
    subprocess.run(["depmod", "-b", str(folder / "root"), modules.name], check=True)
    (folder / "order").write_text("".join(f"/lib/modules/{modules.name}/{file}\n" for file in order))


def _module_name(file: str) -> str:
    return Path(file).name.split(".ko", 1)[0].replace("-", "_")


def _unsigned(module: bytes) -> bytes:
    """Without its signature, which takes long to check in an emulation (scripts/sign-file.c)."""
    mark = b"~Module signature appended~\n"
    if not module.endswith(mark):
        return module
    info = len(module) - len(mark) - 12
    return module[: info - int.from_bytes(module[info + 8 : info + 12], "big")]


# --- the initial memory disk ---------------------------------------------------------


class _Cpio:
    """Writes a "newc" archive (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0
        self._folders: set[str] = set()

    def _entry(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(raw), 0)
        header = "070701" + "".join(f"{field:08X}" for field in fields)
        for part in (header.encode() + raw, content):
            self._out.write(part)
            self._out.write(b"\0" * (-self._out.tell() % 4))

    def folder(self, path: str) -> None:
        for parent in [*reversed(Path(path).parents), Path(path)][1:]:
            if str(parent) not in self._folders:
                self._folders.add(str(parent))
                self._entry(str(parent), stat.S_IFDIR | 0o755)

    def file(self, path: str, content: bytes | str, mode: int = 0o644) -> None:
        if "/" in path:
            self.folder(str(Path(path).parent))
        self._entry(path, stat.S_IFREG | mode, content.encode() if isinstance(content, str) else content)

    def console(self) -> None:
        self.folder("dev")
        self._entry("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1))

    def whole(self) -> bytes:
        self._entry("TRAILER!!!", 0)
        return self._out.getvalue()


def _memory_disk(
    engine: Engine, kernel: Path, share: Path, command: Sequence[str], env: Mapping[str, str]
) -> bytes:
    disk = _Cpio()
    disk.console()
    disk.file("bin/busybox", Path(shutil.which("busybox") or "/bin/busybox").read_bytes(), 0o755)
    for file in sorted((kernel / "root").rglob("*")):
        if file.is_file():
            disk.file(str(file.relative_to(kernel / "root")), file.read_bytes())
    pair = env.get("OPENFOD_CAN_PAIR", "")
    conf = {
        "SHARE": str(share),
        "VCAN": _VCAN,
        "PAIR": pair,
        "LATE": " ".join(engine.late_modules if pair else ()),
    }
    disk.file("init", _FIRST_STAGE.replace("@MOUNT@", engine.mount), 0o755)
    disk.file("guest/second", _SECOND_STAGE.replace("@PORTS@", engine.ports))
    disk.file("guest/order", (kernel / "order").read_bytes())
    disk.file("guest/conf", "".join(f"{key}={shlex.quote(value)}\n" for key, value in conf.items()))
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in env.items())
    disk.file("guest/command", f"{exports}exec {shlex.join(command)}\n")
    return disk.whole()


# --- the guest -------------------------------------------------------------------------


def _uml_arguments(work: Path, writers: Mapping[str, int]) -> list[str]:
    return [
        "linux.uml",
        f"mem={MEMORY_MIB}M",
        f"initrd={work}/initrd",
        f"uml_dir={work}/",
        "con=null",
        f"con0=null,fd:{writers['console']}",
        *(f"con{i}=null,fd:{writers[port]}" for i, port in enumerate(("out", "err", "ctl"), start=1)),
        *[
            "ssl=null",
            "console=tty0",
            "panic=-1",
            "random.trust_cpu=on",
            "raid=noautodetect",
            "quiet",
            "loglevel=4",
        ],
    ]


def _qemu_arguments(work: Path, writers: Mapping[str, int], kernel: Path, share: Path) -> list[str]:
    append = (
        "console=ttyS0 panic=-1 quiet loglevel=4 mitigations=off nokaslr audit=0 apparmor=0 selinux=0"
        " cryptomgr.notests tsc=reliable no_timer_check random.trust_cpu=on rcupdate.rcu_expedited=1"
        " 8250.nr_uarts=1"
    )
    arguments = ["qemu-system-x86_64", "-M", "q35,vmport=off,smm=off,graphics=off"]
    arguments += ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "Nehalem", "-smp", "2"]
    arguments += ["-m", str(MEMORY_MIB), "-nodefaults", "-no-reboot", "-nographic"]
    arguments += ["-kernel", str(kernel / "kernel"), "-initrd", f"{work}/initrd", "-append", append]
    arguments += ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
    for port, writer in writers.items():
        arguments += ["-chardev", f"file,id={port},path=/proc/self/fd/{writer}"]
        if port == "console":
            arguments += ["-serial", f"chardev:{port}"]
        else:
            arguments += ["-device", f"virtserialport,chardev={port},name={port}"]
    for tag, path, mode in (("root", "/", "on"), ("share", str(share), "off")):
        arguments += [
            "-fsdev",
            f"local,id={tag},path={path},security_model=none,readonly={mode},multidevs=remap",
        ]
        arguments += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    arguments += ["-object", "can-bus,id=wire"]
    return arguments + ["-device", "kvaser_pci,canbus=wire"] * 2


@contextlib.contextmanager
def _started(
    arguments: Sequence[str], writers: Mapping[str, int], work: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A guest's process; its whole group is gone afterwards."""
    with (work / "monitor.log").open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *arguments],  # it ends with us
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=list(writers.values()),
            start_new_session=True,  # a group of its own: user-mode Linux has many processes
            # User-mode Linux maps its memory from a file that must be executable.
            env={**os.environ, "TMPDIR": str(work)},
        )
    for writer in writers.values():
        os.close(writer)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _follow(
    process: subprocess.Popen[bytes], readers: Mapping[str, int], timeout_s: float
) -> tuple[int, bytes]:
    """Hands output on until the guest ends; returns the command's exit status and the console's text."""
    ends_s = time.monotonic() + timeout_s
    sinks = {readers["out"]: sys.stdout.buffer, readers["err"]: sys.stderr.buffer}
    kept = {readers["ctl"]: b"", readers["console"]: b""}
    status = TIMED_OUT
    open_readers = list(readers.values())
    while open_readers and (left_s := ends_s - time.monotonic()) > 0:
        for reader in select.select(open_readers, [], [], min(left_s, 0.5))[0]:
            content = os.read(reader, 65536)
            if not content:
                open_readers.remove(reader)
            elif (sink := sinks.get(reader)) is not None:
                sink.write(content)
                sink.flush()
            else:
                kept[reader] = (kept[reader] + content)[-65536:]
        if status == TIMED_OUT and kept[readers["ctl"]].endswith(b"\n"):
            status = int(kept[readers["ctl"]])
            ends_s = min(ends_s, time.monotonic() + SHUTDOWN_S)
    if status == TIMED_OUT and not open_readers:
        process.wait()
        status = BROKEN
    return status, kept[readers["console"]]


def run(engine: Engine, command: Sequence[str], env: Mapping[str, str], timeout_s: float) -> int:
    """Runs a command in a guest, in the present folder; returns its exit status.

    Raises:
        NoGuestError: there can be no guest here.
    """
    kernel, share = prepare(engine), Path.cwd()
    in_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as made:
        work = Path(made)
        (work / "initrd").write_bytes(_memory_disk(engine, kernel, share, command, env))
        pipes = {name: os.pipe() for name in ("out", "err", "ctl", "console")}
        readers = {name: pipe[0] for name, pipe in pipes.items()}
        writers = {name: pipe[1] for name, pipe in pipes.items()}
        if engine is UML:
            arguments = _uml_arguments(work, writers)
        else:
            arguments = _qemu_arguments(work, writers, kernel, share)
        with _started(arguments, writers, work) as process:
            status, console = _follow(process, readers, timeout_s)
        if status in {TIMED_OUT, BROKEN} or b"guest: " in console:
            print(f"guest: ended with {status}", console[-4000:].decode(errors="replace"), file=sys.stderr)
            print((work / "monitor.log").read_text(errors="replace")[-4000:], file=sys.stderr)
        for reader in readers.values():
            os.close(reader)
        return status


def _has_vcan() -> bool:
    return hasattr(socket, "AF_CAN") and Path("/sys/class/net", _VCAN).exists()


def main() -> int:
    """Runs the command here or in a guest."""
    parser = argparse.ArgumentParser(prog="python -m tools.guest", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kvaser", action="store_true", help="can0 and can1: two controllers, one wire")
    parser.add_argument("--qemu", action="store_true", help="an emulated machine")
    parser.add_argument("--timeout", type=float, default=300, help="for everything, seconds")
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args()
    env = {"OPENFOD_CAN": _VCAN} | {
        k: v for k, v in os.environ.items() if k.startswith(("OPENFOD_", "PYTHON"))
    }
    if asked.kvaser:
        env["OPENFOD_CAN_PAIR"] = _PAIR
    elif _has_vcan():
        return subprocess.run(asked.command, check=False, env={**os.environ, **env}).returncode
    begun_s = time.monotonic()
    try:
        status = run(QEMU if asked.kvaser or asked.qemu else UML, asked.command, env, asked.timeout)
    except NoGuestError as error:
        print(f"skipped: no SocketCAN here, and no guest: {error}", file=sys.stderr)
        return SKIPPED
    print(f"guest: {time.monotonic() - begun_s:.0f} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
