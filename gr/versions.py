"""The tested sets of torch, torchrec, fbgemm-gpu and triton, and a check that one of them is here.

A mismatched set shows as an undefined symbol deep in a binary. Free of torch: reads metadata only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

FBGEMM_CUDA = "fbgemm-gpu"
FBGEMM_CPU = "fbgemm-gpu-cpu"


@dataclass(frozen=True)
class VersionSet:
    """Versions that were tested together (requirements/)."""

    name: str
    """cpu or cuda, as in requirements/NAME.txt."""
    fbgemm_package: str
    """Distribution that brings FBGEMM."""
    torch: str
    torchrec: str
    fbgemm: str
    triton: str

    def expected(self) -> dict[str, str]:
        """Return distribution -> version."""
        return {
            "torch": self.torch,
            "torchrec": self.torchrec,
            self.fbgemm_package: self.fbgemm,
            "triton": self.triton,
        }

    def install_command(self) -> str:
        """Return what installs the set."""
        return (
            f"pip uninstall -y {FBGEMM_CUDA} {FBGEMM_CPU} && "
            f"pip install -r requirements/torch-{self.name}.txt && "
            f"pip install --no-deps -r requirements/{self.name}.txt"
        )


CPU = VersionSet(
    "cpu", FBGEMM_CPU, torch="2.13.0", torchrec="1.8.0", fbgemm="1.8.0", triton="3.8.0"
)
CUDA = VersionSet(
    "cuda", FBGEMM_CUDA, torch="2.11.0", torchrec="1.6.1", fbgemm="1.6.0", triton="3.6.0"
)
TRITON_MISCOMPILES = "3.7.1"


def check_versions(find: Callable[[str], str] = metadata.version) -> None:
    """Refuse a set of versions that was not tested together.

    Args:
        find: returns the version of a distribution or raises PackageNotFoundError.

    Raises:
        ValueError: one line: what was found, what is expected, the command that installs it.
    """
    found: dict[str, str] = {}
    for package in ("torch", "torchrec", FBGEMM_CUDA, FBGEMM_CPU, "triton"):
        try:
            found[package] = find(package).split("+")[0]  # +cpu, +cu130 name the build
        except metadata.PackageNotFoundError:
            continue
    if FBGEMM_CUDA in found and FBGEMM_CPU in found:
        wanted = CPU if found.get("torch") == CPU.torch else CUDA
        raise ValueError(
            f"both {FBGEMM_CUDA} and {FBGEMM_CPU} are installed, into the same folder: one has "
            f"overwritten the other. Install again: {wanted.install_command()}"
        )
    wanted = CUDA if FBGEMM_CUDA in found or found.get("torch") == CUDA.torch else CPU
    wrong = [
        f"{package} {found.get(package, 'missing')} (expected {version})"
        for package, version in wanted.expected().items()
        if found.get(package) != version
        # Triton runs kernels on a GPU, or in the interpreter tier; the CPU needs none.
        and not (package == "triton" and wanted is CPU and package not in found)
    ]
    if wrong:
        hopper = (
            ""
            if found.get("triton") != TRITON_MISCOMPILES
            else (f" Triton {TRITON_MISCOMPILES} miscompiles our kernels on Hopper.")
        )
        raise ValueError(
            f"not the tested {wanted.name} set: {', '.join(wrong)}.{hopper} "
            f"Install it: {wanted.install_command()}"
        )
