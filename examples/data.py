"""Text as bytes: the Python standard library's own sources, or what --data names."""

import random
import sysconfig
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

VALIDATION_SHARE = 0.05
MAX_BYTES = 256 * 2**20  # of a folder; beyond it, files are left out
# Installed packages are not the standard library; tests and code tables are
# long and monotonous.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"}


@dataclass
class Corpus:
    train: Tensor  # (n) uint8
    validation: Tensor  # (n) uint8, from files (or the end of the file) that training never sees
    description: str
    digest: str  # of both: tells whether two runs saw the same text

    def batch(self, size, context, generator):
        """Random windows: inputs and targets, (size, context) int64 each."""
        starts = torch.randint(len(self.train) - context, (size, 1), generator=generator)
        window = self.train[starts + torch.arange(context + 1)].long()
        return window[:, :-1], window[:, 1:]

    def validation_batches(self, windows, size, context):
        """The same evenly spaced windows every time."""
        last = len(self.validation) - context - 1
        starts = torch.linspace(0, last, min(windows, 1 + last // context)).long()
        for chunk in starts.split(size):
            window = self.validation[chunk[:, None] + torch.arange(context + 1)].long()
            yield window[:, :-1], window[:, 1:]


def load_corpus(path=None, context=256, option="--data"):
    """Reads a file, a folder's text files, or (path None) the standard library.

    Raises FileNotFoundError where nothing is, ValueError where there is too
    little text for windows of `context` bytes; `option` is who asked for the path.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [
            p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & {*p.relative_to(root).parts}
        ]
        name = "the Python standard library"
    else:
        root = Path(path)
        if not root.exists():
            raise FileNotFoundError(f"{option}: no such file or folder: {path}")
        files = [root] if root.is_file() else [p for p in root.rglob("*") if not _hidden(p, root)]
        name = str(path)

    texts = _read(sorted(p for p in files if p.is_file()))
    if not texts:
        raise ValueError(f"{option}: no text in {name}")
    train, validation = _split(texts)
    needed = 2 * (context + 1)
    if len(train) < needed or len(validation) < needed:
        raise ValueError(
            f"{option}: {name} is too small: a context of {context} needs at least {needed} bytes to"
            f" train on and {needed} to validate on, got {len(train):,} and {len(validation):,}"
        )
    megabytes = (len(train) + len(validation)) / 1e6
    files = f"{len(texts)} file" + "s" * (len(texts) > 1)
    return Corpus(
        *(torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in (train, validation)),
        description=f"{name} ({files}, {megabytes:.1f} MB)",
        digest=sha256(train + validation).hexdigest()[:16],
    )


def _hidden(path, root):
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _read(files):
    """The text files' bytes; a NUL in the first 8 KiB marks a binary."""
    texts, total = [], 0
    for file in files:
        try:
            content = file.read_bytes()
        except OSError:
            continue
        if content and b"\0" not in content[:8192] and total + len(content) <= MAX_BYTES:
            texts.append(content)
            total += len(content)
    return texts


def _split(texts):
    """Whole files, in a fixed random order, until 5 %; of a single file, its end."""
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - VALIDATION_SHARE))
        return texts[0][:cut], texts[0][cut:]
    random.Random(0).shuffle(texts)
    wanted, count, size = sum(map(len, texts)) * VALIDATION_SHARE, 0, 0
    while size < wanted and count < len(texts) - 1:
        size += len(texts[count])
        count += 1
    return b"\n".join(texts[count:]), b"\n".join(texts[:count])
