"""examples/Dockerfile, step by step as it stands, in a folder that holds nothing but a new Debian.

No container program is needed. `debootstrap` makes the folder, which is what the image `debian:bookworm-slim` is made of, and
every step runs in it by `chroot`. So this needs root on Linux, and Debian's packages; elsewhere it is skipped. The Python
packages are those that pip finds on this machine.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "examples" / "Dockerfile"


def steps() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and what follows them, with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for line in joined.splitlines() if line for word, _, rest in [line.partition(" ")]]


def test_it_copies_what_exists_and_starts_with_the_demo():
    known = {"FROM", "RUN", "ENV", "ARG", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in steps()} == known
    for word, rest in steps():
        if word == "COPY":
            assert all((ROOT / name).exists() for name in rest.split()[:-1])
    start = dict(steps())
    assert json.loads(start["ENTRYPOINT"]) + json.loads(start["CMD"]) == ["icl", "demo"]


class Machine:
    """A root folder in which the instructions are carried out."""

    def __init__(self, root: Path, packages: Path) -> None:
        self.root, self.place = root, "/"
        shutil.copytree(packages, root / "packages")
        shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
        # The default is Docker's. The packages come from a folder, because the pip of the new system knows no other place.
        self.environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": "/packages",
        }

    def do(self, word: str, rest: str) -> None:
        if word == "RUN":
            self.run("sh", "-c", rest)
        elif word == "ENV":
            key, _, value = rest.partition("=")
            self.environment[key] = value
        elif word == "WORKDIR":
            self.place = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *names, target = rest.split()
            for name in names:
                into = self.root / self.place.lstrip("/") / target
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, into, ignore=lambda *_: ["__pycache__"])
                else:
                    shutil.copy(ROOT / name, into)

    def run(self, *words: str) -> str:
        """A command in the folder, with processes and mounts of its own."""
        inner = 'mount -t proc proc /proc && cd "$0" && exec "$@"'
        command = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "chroot",
            str(self.root),
            "sh",
            "-c",
            inner,
            self.place,
            *words,
        ]
        done = subprocess.run(command, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("debootstrap") or not shutil.which("unshare") or os.geteuid() != 0,
    reason="needs root, unshare and debootstrap",
)
def test_its_steps_build_an_image_that_runs_the_demo(tmp_path):
    suite = dict(steps())["FROM"].removeprefix("debian:").removesuffix("-slim")
    system, packages = tmp_path / "system", tmp_path / "packages"
    made = subprocess.run(["debootstrap", "--variant=minbase", suite, str(system)], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-3000:]
    download = [sys.executable, "-m", "pip", "download", "-qq", "-d", str(packages)]
    subprocess.run([*download, "-c", str(ROOT / "constraints.txt"), "setuptools>=77", str(ROOT)], check=True)
    machine = Machine(system, packages)
    for word, rest in steps():
        machine.do(word, rest)
    start = dict(steps())
    assert "healthy" in machine.run(*json.loads(start["ENTRYPOINT"]), *json.loads(start["CMD"]))
    assert {"demo.png", "report.html", "summary.csv"} <= {path.name for path in (system / "runs" / "demo").iterdir()}
    # The kernels were compiled there.
    assert list((system / "root").glob(".cache/icl/*.so"))
