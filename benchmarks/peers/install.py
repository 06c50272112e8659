"""Installs peers, an environment each in build/peers/, unless they are there as pinned.

    python -m peers.install [PEER ...]     # in benchmarks/; all by default

The environments take this Python. torch is wanted without CUDA: where pip's index has another,
PIP_EXTRA_INDEX_URL names PyTorch's own for the CPU.
"""

import subprocess
import sys

import peers


def install(peer):
    """Whether it is there, now or before."""
    if peers.is_installed(peer):
        return True
    stamp = peers.stamp_of(peer.VENV)
    print(f"{peer.TITLE}: installing {' '.join(peer.REQUIREMENTS)} ...", flush=True)
    stamp.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", stamp.parent], check=True)
    pip = [peers.python_of(peer.VENV), "-m", "pip", "-q", "--disable-pip-version-check"]
    with open(stamp.parent / "log", "w") as log:
        done = subprocess.run([*pip, "install", *peer.REQUIREMENTS], stdout=log, stderr=log)
    if done.returncode:
        print(f"{peer.TITLE}: pip failed, see {log.name}")
        return False
    stamp.write_text("\n".join(peer.REQUIREMENTS) + "\n")
    return True


if __name__ == "__main__":
    chosen = peers.modules(sys.argv[1:] or peers.NAMES)
    sys.exit(not all([install(peer) for peer in chosen]))  # one failure does not stop the others
