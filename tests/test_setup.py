"""setup.sh picks the right PyTorch build. A fake `nvidia-smi` and `libcuda` play the drivers, and every run is dry."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / "setup.sh", ROOT / ".ci" / "run"]

# The header lines as the drivers print them: the usual one, and the newer one.
CLASSIC = "| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: {cuda:<9}|"
RENAMED = "| NVIDIA-SMI 610.43.02              KMD Version: 610.43.02     CUDA UMD Version: {cuda:<9}|"

# What `nvidia-smi` prints below the header looks like more version numbers; none of it may be taken for the version.
TABLE = """\
Sun Nov 16 12:00:00 2025
+-----------------------------------------------------------------------------------------+
{header}
|-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:18:00.0 Off |                    0 |
| N/A   34C    P0             72W /  700W |      13MiB /  81559MiB |      0%      Default |
+-----------------------------------------+------------------------+----------------------+
"""

BUILDS = {
    "12.1": "torch==2.6.0+cu124",
    "12.4": "torch==2.6.0+cu124",
    "12.6": "torch==2.13.0+cu126",
    "12.8": "torch==2.11.0+cu128",
    "13.0": "torch==2.13.0+cu130",
}
CPU = "torch==2.13.0+cpu"


class Machine:
    """A machine with the driver that a test gives it; without one, neither nvidia-smi nor libcuda answers."""

    def __init__(self, directory: Path):
        self.bin = directory / "bin"
        self.modules = directory / "modules"
        self.venv = directory / "venv"
        self.bin.mkdir()
        self.modules.mkdir()
        self.program("python3", f'exec "{sys.executable}" "$@"')
        self.system("Linux", "x86_64")
        self.nvidia_smi("echo 'NVIDIA-SMI has failed because it could not communicate with the driver.'; exit 9")
        self.libcuda(None)

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def system(self, kernel: str, machine: str) -> None:
        self.program("uname", f"case $1 in -s) echo {kernel} ;; -m) echo {machine} ;; esac")

    def nvidia_smi(self, body: str) -> None:
        self.program("nvidia-smi", body)

    def driver(self, cuda: str, header: str = CLASSIC, compute_cap: str = "9.0") -> None:
        table = TABLE.format(header=header.format(cuda=cuda))
        self.nvidia_smi(
            f"case $* in *--query-gpu=compute_cap*) printf '{compute_cap}\\n'; exit ;; esac\ncat <<'END'\n{table}END"
        )

    def libcuda(self, version: int | None, devices: int = 1) -> None:
        """A stand-in for the module that setup.sh reaches libcuda through; `version` as cuDriverGetVersion tells it."""
        absent = "raise OSError" if version is None else "pass"
        (self.modules / "ctypes.py").write_text(f"""
class c_int:
    value = 0

def byref(number):
    return number

class CDLL:
    def __init__(self, name):
        {absent}

    def cuInit(self, flags):
        return 0 if {devices} else 100

    def cuDeviceGetCount(self, count):
        count.value = {devices}
        return 0

    def cuDriverGetVersion(self, version):
        version.value = {version}
        return 0
""")

    def setup(self, *options: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": str(self.modules)}
        command = ["bash", str(ROOT / "setup.sh"), "--venv", str(self.venv), *options]
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )

    def plan(self, *options: str) -> str:
        """What a dry run says about PyTorch; checks that it went well and changed nothing."""
        run = self.setup("--dry-run", *options)
        assert (run.returncode, run.stderr) == (0, "")
        assert not self.venv.exists()
        (line,) = [line for line in run.stdout.splitlines() if line.startswith("pytorch ")]
        return line


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_bash(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60).stderr == ""


@pytest.mark.parametrize(
    ("cuda", "build"),
    [
        ("12.0", "12.1"),
        ("12.1", "12.1"),
        ("12.2", "12.1"),
        ("12.4", "12.4"),
        ("12.5", "12.4"),
        ("12.6", "12.6"),
        ("12.8", "12.8"),
        ("12.9", "12.8"),
        ("13.0", "13.0"),
        ("13.1", "13.0"),
        ("14.0", "13.0"),
    ],
)
def test_the_driver_decides(machine, cuda, build):
    machine.driver(cuda)
    line = machine.plan()
    assert BUILDS[build] in line
    assert f"supports CUDA {cuda}" in line
    # where the build is newer than the driver, the plan says on what ground it runs
    assert ("every CUDA 12 driver runs this one" in line) == (build == "12.1")


def test_the_renamed_header_is_read(machine):
    machine.driver("13.3", header=RENAMED)
    assert BUILDS["13.0"] in machine.plan()


def test_too_old_a_driver_gives_the_cpu_build_and_the_reason(machine):
    machine.driver("11.8")
    line = machine.plan()
    assert CPU in line
    assert "supports CUDA 11.8 only" in line
    assert "525 or newer" in line


@pytest.mark.parametrize("cuda", ["12.8", "13.0"])
def test_a_gpu_before_turing_gets_the_last_build_that_serves_it(machine, cuda):
    machine.driver(cuda, compute_cap="9.0\\n7.0")
    assert BUILDS["12.6"] in machine.plan()
    machine.driver(cuda, compute_cap="7.5\\n12.0")
    assert BUILDS[cuda] in machine.plan()


def test_no_driver_gives_the_cpu_build(machine):
    line = machine.plan()
    assert CPU in line
    assert "no NVIDIA driver" in line


def test_without_nvidia_smi_the_driver_library_is_asked(machine):
    machine.libcuda(12060)
    assert BUILDS["12.6"] in machine.plan()
    machine.libcuda(13010)
    assert BUILDS["13.0"] in machine.plan()
    machine.libcuda(13010, devices=0)  # the library alone, as in some container images
    assert CPU in machine.plan()


@pytest.mark.parametrize("cuda", BUILDS)
def test_the_user_decides_over_the_driver(machine, cuda):
    machine.driver("11.8")
    assert BUILDS[cuda] in machine.plan("--cuda", cuda)
    assert BUILDS[cuda] in machine.plan(f"--cuda={cuda}")
    machine.driver("13.0")
    assert CPU in machine.plan("--cpu")


def test_other_platforms(machine):
    machine.driver("12.2")
    machine.system("Linux", "aarch64")  # the first CUDA 12 wheels for it are those of 12.6
    line = machine.plan()
    assert BUILDS["12.6"] in line
    assert "every CUDA 12 driver runs this one" in line
    machine.system("Darwin", "arm64")  # one unlabelled build, on PyPI
    assert "torch==2.13.0 " in machine.plan()
    assert machine.setup("--dry-run", "--cuda", "12.4").returncode == 2
    machine.system("Darwin", "x86_64")
    assert machine.setup("--dry-run").returncode == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--cuda", "12.3"],
        ["--cuda", "12"],
        ["--cuda"],
        ["--cuda", "--dry-run"],
        ["--cpu", "--cuda", "12.4"],
        ["--cuda", "12.4", "--cpu"],
        ["--extras", "nonsense"],
        ["--extras", ""],
        ["--python", "no-such-python"],
        ["--frobnicate"],
        ["stray"],
    ],
    ids=" ".join,
)
def test_a_bad_option_ends_with_one_line_and_status_2(machine, options):
    run = machine.setup(*options)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("setup.sh: ")
    assert len(run.stderr.splitlines()) == 1
    assert not machine.venv.exists()


def test_a_python_out_of_range_is_passed_over_or_refused(machine):
    machine.program("old-python", "echo 3.9")
    run = machine.setup("--dry-run", "--python", "old-python")
    assert run.returncode == 2
    assert "is Python 3.9, hymba needs 3.10 to 3.13" in run.stderr

    machine.program("python3", "echo 3.14")
    for version in ("3.10", "3.12", "3.13"):
        machine.program(f"python{version}", "exit 127")  # as a version manager's shims do
    machine.program("python3.11", "echo 3.11")
    run = machine.setup("--dry-run", "--cpu")
    assert "3.11 (python3.11)" in run.stdout


def test_a_directory_with_other_things_in_it_is_left_alone(machine):
    machine.venv.mkdir()
    (machine.venv / "thesis.tex").write_text("years of work")
    run = machine.setup()
    assert run.returncode == 1
    assert "is no Python environment" in run.stderr
    assert [path.name for path in machine.venv.iterdir()] == ["thesis.tex"]


def test_the_plan_names_everything(machine):
    plan = machine.setup("--dry-run", "--extras", "test").stdout
    assert [line.split()[0] for line in plan.splitlines()] == ["python", "pytorch", "environment", "project", "status"]
    assert f"{machine.venv} (new)" in plan
    assert "with extras test" in plan
    assert "--cuda VERSION" in machine.setup("--help").stdout


def test_setup_works_from_any_directory(tmp_path):
    command = ["bash", str(ROOT / "setup.sh"), "--dry-run", "--cpu", "--venv", "here"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert f"{tmp_path / 'here'} (new)" in run.stdout
