# SPDX-License-Identifier: Apache-2.0
"""Whether the built wheel works where nothing else of the project is.

    python -m tools.check_wheel DIST      # the folder with the wheel and the sdist

The wheel goes into an empty virtual environment, as the Dockerfile installs it. Of the
environment that runs this, the new one sees the other packages, vLLM among them, and
neither the checkout nor its editable install. Then a tiny model is served from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]

_LOOK = """
import importlib.metadata, json, pathlib, vllm_roco
distribution = importlib.metadata.distribution("vllm-roco")
print(json.dumps({
    "package": str(pathlib.Path(vllm_roco.__file__).parent),
    "version": [distribution.version, vllm_roco.__version__],
    "extras": distribution.metadata.get_all("Provides-Extra"),
    "files": [str(file) for file in distribution.files],
}))
"""


def main(dist: Path) -> int:
    """Install the wheel that lies in `dist` and use it.

    Args:
        dist: A folder with one wheel.

    Returns:
        The exit status, 0 if all is well.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        _make_environment(place / "env")
        environ = {
            name: os.environ[name] for name in os.environ if name[:6] != "PYTHON"
        }
        environ["PATH"] = os.pathsep.join([f"{place / 'env/bin'}", os.environ["PATH"]])

        def run(*command: str | Path) -> str:
            done = subprocess.run(
                command,
                cwd=place,
                env=environ,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                called = " ".join(map(str, command))
                sys.exit(f"{called}\n{done.stdout}{done.stderr}")
            return done.stdout

        python = place / "env/bin/python"
        run(ROOT / "tools/install_wheel.sh", dist.resolve())
        found = json.loads(run(python, "-c", _LOOK))
        if troubles := list(_troubles(found, place)):
            sys.exit("\n".join(troubles))
        checks = ("versions", "registration", "engine")
        print(run(python, "-m", "vllm_roco.verify", "--only", *checks), end="")
    return 0


def _make_environment(place: Path) -> None:
    """Make a virtual environment that sees the packages of this one."""
    venv.create(place, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = place / "lib" / version / "site-packages"
    # a path that a .pth file names is searched last, and its own .pth files, by which
    # editable installs are found, are not read
    purelib = sysconfig.get_path("purelib")
    (site_packages / "packages_of_the_checkout.pth").write_text(f"{purelib}\n")


def _troubles(found: dict[str, object], place: Path) -> list[str]:
    """Return what is wrong with an installed wheel, one sentence each."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    troubles = []
    package, files = Path(str(found["package"])), found["files"]
    assert isinstance(files, list)
    if place not in package.parents:
        troubles.append(f"vllm_roco is imported from {package}, not from the wheel")
    if found["version"] != [project["version"]] * 2:
        troubles.append(f"version {project['version']} says {found['version']}")
    if found["extras"] != list(project["optional-dependencies"]):
        troubles.append(f"the extras are {found['extras']}")
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("vllm_roco/**/*.py")}
    if missing := {"vllm_roco/py.typed", *sources} - {*files}:
        troubles.append(f"not in the wheel: {', '.join(sorted(missing))}")
    if others := [
        name for name in files if not name.startswith(("vllm_roco/", "vllm_roco-"))
    ]:
        troubles.append(f"nobody's business to install: {', '.join(others)}")
    return troubles


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
