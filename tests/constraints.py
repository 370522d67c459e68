"""Prints the versions installed beside this Python as constraints for pip: `make constraints` keeps them in the file.

A release that the older of our Pythons cannot install is pinned for the newer ones only; there the older ones take
the newest release that still supports them, which no longer changes.
"""

from importlib.metadata import Distribution, distributions

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# pip belongs to the virtual environment; CUDA and Triton go with the build of torch, which pins what it needs.
LEFT_OUT = ("d2ft-hpc", "pip", "cuda-", "nvidia-", "triton")


def main() -> None:
    installed = {canonicalize_name(each.name): each for each in distributions()}
    print("# The newest versions that the suite passed on; `make constraints` renews the file.")
    for name, distribution in sorted(installed.items()):
        if not name.startswith(LEFT_OUT):
            # A build's label (+cpu) is left out: pip takes a labelled build for the same version.
            print(f"{name}=={Version(distribution.version).public}{marker(distribution)}")


def marker(distribution: Distribution) -> str:
    """Empty, or the condition under which pip can install the version at all."""
    supported = SpecifierSet(distribution.metadata["Requires-Python"] or "")
    oldest = next(python for python in PYTHONS if f"{python}.99" in supported)
    return "" if oldest == PYTHONS[0] else f'; python_version >= "{oldest}"'


if __name__ == "__main__":
    main()
