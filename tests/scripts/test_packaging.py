"""The distribution: which packages a wheel and an sdist hold, and that they work beside a user's own `brokers`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("stageflow_actors", "brokers", "tests", "examples", "scripts")
FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")

PROJECT = """
from brokers import Kraken
from stageflow_actors import Runtime, Workflow

flow = Workflow("flow")


@flow.stage
def one(job: dict) -> str:
    return Kraken.__name__


if __name__ == "__main__":
    import stageflow_actors, stageflow_brokers

    with Runtime(flow, data_dir="data") as runtime:
        print(runtime.execute(flow, {}, timeout=60).stages[0].data)
    print(stageflow_actors.__file__)
    print(stageflow_brokers.__file__)
"""
"""A program with a package or a module of its own that is called `brokers`, as trading programs have."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the sdist, built from a copy of the sources."""
    sources = tmp_path_factory.mktemp("sources")
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for folder in BUILT_FROM:
        shutil.copytree(ROOT / folder, sources / folder, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, sources)
    target = tmp_path_factory.mktemp("built")
    run = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(target)],
        cwd=sources,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return target


def test_the_wheel_holds_the_two_packages_and_nothing_else_at_the_top(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"stageflow_actors", "stageflow_brokers"}
    assert len(tops) == 3
    assert {"stageflow_actors/py.typed", "stageflow_brokers/py.typed"} <= set(names)
    modules = {
        str(path.relative_to(folder))
        for folder in (ROOT, ROOT / "brokers")
        for package in ("stageflow_actors", "stageflow_brokers")
        for path in (folder / package).rglob("*.py")
    }
    assert modules <= set(names)


def test_the_sdist_holds_what_a_build_and_a_test_run_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(FILES) <= names
    assert {"brokers/stageflow_brokers/api.py", "tests/conftest.py", "scripts/test", "examples/orders.jsonl"} <= names


@pytest.mark.parametrize("own", ["brokers/__init__.py", "brokers.py"])
def test_a_project_may_have_a_package_of_its_own_that_is_called_brokers(own: str, built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).write_text("class Kraken: pass\n")
    (tmp_path / "program.py").write_text(textwrap.dedent(PROJECT))
    # -S leaves out the .pth file of an editable install, which puts the sources on the path.
    path = os.pathsep.join([str(installed), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])
    run = subprocess.run(
        [sys.executable, "-S", "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [
        "Kraken",
        str(installed / "stageflow_actors/__init__.py"),
        str(installed / "stageflow_brokers/__init__.py"),
    ]


@pytest.mark.parametrize("package", ["stageflow_actors", "stageflow_brokers"])
def test_a_type_checker_may_trust_the_package(package: str) -> None:
    assert resources.files(package).joinpath("py.typed").is_file()


@pytest.mark.parametrize("script", ["scripts/test", ".ci/run"])
def test_the_script_can_be_started_as_it_lies_there(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111
