"""Drives a VM through firecracker-python: creates it, reads its console, pauses, resumes and deletes it.

usage: microvm.py DIRECTORY KERNEL INITRD ROOTFS
The guest's root disk runs profile.sh.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import stubs

directory, kernel, initrd, rootfs = sys.argv[1:]
stubs.install(directory)

from firecracker import MicroVM  # noqa: E402  (it imports what has been put in place above)
from firecracker.config import MicroVMConfig  # noqa: E402

LIMIT = 400  # seconds; for anything that a guest does on an emulated KVM on a busy machine
GUEST = "172.30.8.2"


def text_of(file):
    with open(file, errors="replace") as opened:
        return opened.read()


def wait_for(what, file):
    deadline = time.monotonic() + LIMIT
    while what not in text_of(file):
        assert time.monotonic() < deadline, f"no {what!r} in {file}"
        time.sleep(0.2)


def echo(text, limit):
    """What the guest's echo server answers, once it listens."""
    deadline = time.monotonic() + limit
    while True:
        try:
            return answer(text, limit)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the guest's echo server does not listen"
            time.sleep(0.2)


def answer(text, limit):
    with socket.create_connection((GUEST, 7), timeout=limit) as connection:
        connection.sendall(text)
        return connection.recv(len(text))


vm = MicroVM(kernel_file=kernel, initrd_file=initrd, base_rootfs=rootfs, vcpu=2, memory=256, ip_addr=GUEST)
made = vm.create()
[known] = MicroVM.list()
id = known["id"]
assert made == f"VMM {id} created", made
home = f"{MicroVMConfig().data_path}/{id}"
tap = f"tap_{id}"
console = f"{home}/firecracker.log"
try:
    wait_for("BOOTED", console)
    assert echo(b"hello", LIMIT) == b"hello"

    config = vm.config()
    assert config["boot-source"]["kernel_image_path"] == kernel, config
    assert config["machine-config"]["vcpu_count"] == 2, config
    assert config["machine-config"]["mem_size_mib"] == 256, config
    assert [drive["drive_id"] for drive in config["drives"]] == ["rootfs"], config
    assert [nic["host_dev_name"] for nic in config["network-interfaces"]] == [tap], config
    assert "Running Firecracker v" in text_of(f"{home}/logs/{id}.log")

    assert vm.pause() == f"VMM {id} paused successfully"
    assert vm._vmm.get_vmm_state(id) == "Paused"
    try:
        raise AssertionError(f"the guest answers although it is paused: {echo(b'hello', 1)}")
    except TimeoutError:
        pass
    disk = subprocess.run(["debugfs", "-R", "cat /written", f"{home}/rootfs/rootfs.ext4"], capture_output=True)
    assert disk.stdout == b"from the guest\n", disk

    assert vm.resume() == f"VMM {id} resumed successfully"
    assert vm._vmm.get_vmm_state(id) == "Running"
    assert echo(b"again", LIMIT) == b"again"
finally:
    print(text_of(console))
    # Or the client waits for its dead child, which nobody has taken leave of.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print(vm.delete())

assert not os.path.exists(f"/proc/{known['pid']}")
assert not os.path.exists(home)
assert not os.path.exists(f"/sys/class/net/{tap}")
print("all is well")
