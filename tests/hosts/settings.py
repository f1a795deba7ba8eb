"""What hosts have in /etc: names, and an ssh that lets them reach each other without a question, as root.

As Debian's installer does it, each host finds its own name at 127.0.1.1 too, a trap that real clusters have.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.ranks.launch import CHECKOUT


def write_settings(folder: Path, addresses: Mapping[str, str]) -> None:
    """Keys for all in `folder`, and FOLDER/etc-HOST for each host, given the address of each."""
    for key in ("host", "user"):
        made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(folder / f"{key}_key")]
        subprocess.run(made, check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    public = (folder / "host_key.pub").read_text()
    known = "".join(f"{name} {public}[{name}]:2222 {public}" for name in addresses)
    (folder / "known_hosts").write_text(known)
    for name in addresses:
        etc = folder / f"etc-{name}"
        (etc / "ssh").mkdir(parents=True)
        others = "".join(f"{there} {other}\n" for other, there in addresses.items())
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
        (etc / "shadow").write_text("root:*:19000:0:99999:7:::\nsshd:!:19000::::::\n")
        (etc / "resolv.conf").write_text("")
        (etc / "ssh" / "ssh_config").write_text(
            f"Host *\n    IdentityFile {folder}/user_key\n    UserKnownHostsFile {folder}/known_hosts\n"
        )
        (etc / "ssh" / "sshd_config").write_text(
            f"Port 22\nPort 2222\nHostKey {folder}/host_key\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            "PermitRootLogin prohibit-password\nPidFile none\nLogLevel ERROR\n"
            f"SetEnv PYTHONPATH={CHECKOUT}\n"  # as if hybridpar were installed
        )
