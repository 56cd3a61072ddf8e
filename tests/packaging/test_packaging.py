"""Wheel, source distribution and editable install, all used from outside the repository."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import latent_rl

from .conftest import ROOT, Built, run
from .fatbin import machine_code_architectures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# -S and -I: no site-packages of the editable install and no working directory, only the wheel.
PROBE = """
import importlib.metadata, importlib.util, pathlib, sys
site = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(site))
import latent_rl
from latent_rl import _C
assert pathlib.Path(latent_rl.__file__).is_relative_to(site), latent_rl.__file__
assert pathlib.Path(_C.__file__).is_relative_to(site), _C.__file__
assert "torch" not in sys.modules, "importing latent_rl must be light"
assert _C.philox_words(0, 0, 1) == [0x6627E8D5]
found = importlib.util.find_spec("latent_rl.kernels")
assert found is not None
assert any(pathlib.Path(p).is_relative_to(site) for p in found.submodule_search_locations)
print(latent_rl.__version__, importlib.metadata.version("latent-rl"), _C.has_cuda)
"""


def probe(site: Path, cwd: Path) -> list[str]:
    return run([sys.executable, "-S", "-I", "-c", PROBE, str(site)], cwd=cwd).split()


def test_the_sdist_holds_the_sources_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for wanted in (
        "CMakeLists.txt",
        "LICENSE",
        "csrc/bindings.cpp",
        "kernels/sample_codes/cuda_impl.cu",
        "latent_rl/py.typed",
        "latent_rl/_C.pyi",
        "tests/packaging/test_packaging.py",
    ):
        assert wanted in names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def test_a_wheel_from_the_sdist_works_outside_the_repository(
    cpu_wheel: Built, tmp_path: Path
) -> None:
    version = latent_rl.__version__
    assert probe(cpu_wheel.site, tmp_path) == [version, version, "False"]


def test_the_wheel_holds_every_module_and_kernel(cpu_wheel: Built) -> None:
    names = set(zipfile.ZipFile(cpu_wheel.wheel).namelist())
    tracked = run(["git", "ls-files", "latent_rl", "kernels"], cwd=ROOT).split()
    for path in tracked:
        inside = path if path.startswith("latent_rl/") else f"latent_rl/{path}"
        assert inside in names
    assert "latent_rl/kernels/__init__.py" not in names
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "csrc/"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert "latent-rl = latent_rl.cli:main" in _metadata(cpu_wheel, "entry_points.txt")


def _metadata(built: Built, name: str) -> str:
    archive = zipfile.ZipFile(built.wheel)
    return archive.read(
        next(n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
    ).decode()


def test_kernels_of_the_wheel_can_be_imported(cpu_wheel: Built, tmp_path: Path) -> None:
    kernels = sorted((cpu_wheel.site / "latent_rl" / "kernels").rglob("triton_impl.py"))
    if not kernels:
        pytest.skip("the tree has no Triton kernels")
    names = [f"latent_rl.kernels.{path.parent.name}.triton_impl" for path in kernels]
    code = (
        "import importlib, pathlib, sys; sys.path.insert(0, sys.argv[1])\n"
        f"for name in {names!r}:\n"
        "    module = importlib.import_module(name)\n"
        "    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__\n"
    )
    environment = {"TRITON_INTERPRET": "1", "SKBUILD_EDITABLE_SKIP": "1"}
    run([sys.executable, "-I", "-c", _WITHOUT_EDITABLE + code, str(cpu_wheel.site)],
        cwd=tmp_path, env=environment)  # fmt: skip


# Takes the editable install's finder away, so that the wheel's modules are the ones found.
_WITHOUT_EDITABLE = (
    "import sys\n"
    "sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
)


def test_the_cpu_build_compiles_without_warnings(cpu_wheel: Built) -> None:
    assert "CUDA kernels OFF" in cpu_wheel.log
    assert not re.findall(r"warning:.*", cpu_wheel.log)


def test_the_cpu_extension_needs_no_torch_and_no_cuda(cpu_wheel: Built) -> None:
    _assert_no_foreign_libraries(cpu_wheel.extension)


def _assert_no_foreign_libraries(extension: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf on this machine")
    needed = re.findall(r"NEEDED.*\[(.*)\]", run(["readelf", "-d", str(extension)], cwd=ROOT))
    assert needed
    assert not [name for name in needed if re.search("torch|cuda|nvrtc|gomp", name)]


def test_the_cuda_build_has_machine_code_for_every_architecture(cuda_wheel: Built) -> None:
    if shutil.which("cuobjdump") is not None:
        listing = run(["cuobjdump", "--list-elf", str(cuda_wheel.extension)], cwd=ROOT)
        assert {"80", "90a", "100"} <= set(re.findall(r"sm_(\d+a?)", listing))
    assert machine_code_architectures(cuda_wheel.extension) >= {80, 90, 100}
    # The fat binary alone cannot tell sm_90a from sm_90.
    assert re.search(r"sm_90a", cuda_wheel.log)


def test_no_kernel_spills_registers(cuda_wheel: Built) -> None:
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", cuda_wheel.log)
    registers = _registers(cuda_wheel.log)
    # Four dtypes by three architectures of one kernel at the least.
    assert len(spills) >= 12
    assert {int(count) for pair in spills for count in pair} == {0}
    hopper = {name for name in registers if HOPPER_SCREEN in name}
    assert max(registers[name] for name in registers.keys() - hopper) <= 128
    # What three warpgroups share out at entry: 65,536 / 384, in steps of 8.
    assert max(registers[name] for name in hopper) <= 168


HOPPER_SCREEN = "_nearest_code_hopper_kernel"


def _registers(log: str) -> dict[str, int]:
    """Most registers of every kernel in what ptxas says, by mangled name."""
    most: dict[str, int] = {}
    pattern = r"Compiling entry function '(\S+)' for .*?Used (\d+) registers"
    for name, count in re.findall(pattern, log, re.DOTALL):
        most[name] = max(most.get(name, 0), int(count))
    return most


def test_the_hopper_screen_multiplies_asynchronously(cuda_wheel: Built) -> None:
    # C7508: setmaxnreg ignored; C7510 and its kin: products serialized.
    assert not re.findall(r"\(C75\d\d\)|serialized", cuda_wheel.log)
    found = importlib.util.find_spec("triton")
    nearby = "" if found is None else str(Path(str(found.origin)).parent / "backends/nvidia/bin")
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=nearby)
    if cuobjdump is None:
        pytest.skip("no cuobjdump on this machine")
    listing = run(
        [cuobjdump, "--dump-sass", "--gpu-architecture", "sm_90a", str(cuda_wheel.extension)],
        cwd=ROOT,
    )
    screens = [code for code in listing.split("Function : ") if HOPPER_SCREEN in code[:200]]
    assert len(screens) == 16  # two elements, four widths, with and without scales
    for code in screens:
        # Products of a warpgroup, copies by the tensor engine, registers shared out anew.
        for instruction in ("HGMMA.64x128x16.F32", "UTMALDG.3D", "USETMAXREG"):
            assert instruction in code
        assert not re.search(r"\b(?:STL|LDL)\b", code)


def test_the_cuda_wheel_works_where_there_is_no_device(cuda_wheel: Built, tmp_path: Path) -> None:
    version = latent_rl.__version__
    assert probe(cuda_wheel.site, tmp_path) == [version, version, "True"]
    _assert_no_foreign_libraries(cuda_wheel.extension)


def test_a_wrong_cuda_switch_is_refused(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake on PATH")
    done = subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(tmp_path / "b"), "-DLATENT_RL_CUDA=maybe"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "must be AUTO, ON or OFF, got 'maybe'" in done.stderr


def test_the_installed_package_works_outside_the_repository(tmp_path: Path) -> None:
    code = (
        "import latent_rl, latent_rl._C, latent_rl.kernels, latent_rl.native.sample_codes\n"
        "print(latent_rl.__version__)"
    )
    out = run([sys.executable, "-I", "-c", code], cwd=tmp_path)
    assert out.strip() == latent_rl.__version__
