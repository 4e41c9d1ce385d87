from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from gr.versions import CPU, CUDA, check_versions

ROOT = Path(__file__).parents[2]


def find_in(installed):
    def find(package):
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    return find


@pytest.mark.parametrize("versions", [CPU, CUDA])
def test_the_tested_sets_are_those_of_requirements(versions):
    files = [
        ROOT / "requirements" / f"{stem}.txt" for stem in (f"torch-{versions.name}", versions.name)
    ]
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    assert {"triton": versions.triton} | pinned == versions.expected()


@pytest.mark.parametrize("versions", [CPU, CUDA])
def test_a_tested_set_passes_whatever_its_build(versions):
    installed = {package: f"{version}+cu130" for package, version in versions.expected().items()}
    check_versions(find_in(installed))


def test_the_cpu_set_needs_no_triton_the_cuda_set_does():
    check_versions(find_in({p: v for p, v in CPU.expected().items() if p != "triton"}))
    with pytest.raises(ValueError, match=r"triton missing \(expected 3\.6\.0\)"):
        check_versions(find_in({p: v for p, v in CUDA.expected().items() if p != "triton"}))


@pytest.mark.parametrize("versions", [CPU, CUDA])
@pytest.mark.parametrize("package", ["torch", "torchrec", "fbgemm"])
def test_one_wrong_version_is_named_with_what_installs_the_right_one(versions, package):
    package = versions.fbgemm_package if package == "fbgemm" else package
    installed = versions.expected() | {package: "0.9.9"}
    with pytest.raises(ValueError, match=rf"{package} 0\.9\.9 \(expected ") as caught:
        check_versions(find_in(installed))
    assert f"-r requirements/{versions.name}.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_both_builds_of_fbgemm_are_refused():
    with pytest.raises(ValueError, match="both fbgemm-gpu and fbgemm-gpu-cpu"):
        check_versions(find_in(CPU.expected() | {"fbgemm-gpu": "1.8.0"}))


def test_the_miscompiling_triton_is_named():
    with pytest.raises(ValueError, match="miscompiles our kernels on Hopper"):
        check_versions(find_in(CUDA.expected() | {"triton": "3.7.1"}))
