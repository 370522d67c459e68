"""Prints the lowest versions that pyproject.toml promises as constraints for pip: `make test-oldest` installs them."""

import re
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
HINTS = ("huggingface-hub<1", "fsspec<=2024.9.0")
"""What the lowest transformers and datasets need: pip finds it by itself, but only after hours."""


def main() -> None:
    # Python 3.10 has no reader of TOML; the file writes each requirement as "NAME>=VERSION".
    for name, version in dict(re.findall(r'"([\w-]+)>=([\d.]+)', PROJECT.read_text())).items():
        print(f"{name}=={version}")
    print(*HINTS, sep="\n")


if __name__ == "__main__":
    main()
