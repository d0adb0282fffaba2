"""Wheel, sdist and editable install carry the SQL of migrations/, and nothing that users do not need."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SQL = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "migrations").glob("*.sql")}

# What git ignores, and what would make a build see an earlier one.
LITTER = shutil.ignore_patterns(
    ".git", ".venv", ".tox", ".greenjobs", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.egg-info"
)

LOADED_SQL = "import json; from greenjobs import migrate; print(json.dumps([each.sql for each in migrate.load()]))"


def build(hook: str, source: Path, folder: Path) -> Path:
    """Call one of the build hooks of PEP 517 and 660, as pip does, offline with the setuptools of this environment."""
    folder.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the checkout, so that nothing is built in it."""
    copy = tmp_path_factory.mktemp("packaging") / "source"
    shutil.copytree(ROOT, copy, ignore=LITTER)
    yield copy
    shutil.rmtree(copy)


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.Path]:
    with zipfile.ZipFile(build("build_wheel", source, tmp_path_factory.mktemp("packaging") / "wheel")) as archive:
        yield zipfile.Path(archive)


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("packaging")
    archive = build("build_sdist", source, folder / "sdist")
    with tarfile.open(archive) as tar:
        # The default of later Pythons, which 3.12 and 3.13 warn about; early releases of 3.10 and 3.11 have none.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        tar.extractall(folder / "unpacked")
    return folder / "unpacked" / archive.name.removesuffix(".tar.gz")


def wheel_names(wheel: zipfile.Path) -> set[str]:
    return set(wheel.root.namelist())


def sql_in_wheel(wheel: zipfile.Path) -> dict[str, str]:
    return {each.name: each.read_text("utf-8") for each in (wheel / "greenjobs" / "migrations").iterdir()}


def run_installed(site: Path, code: str) -> str:
    """Run code where the package in `site` is installed, beside the dependencies of this environment.

    Without the .pth files of this environment (-S) and without its own greenjobs, which would come before.
    """
    dependencies = site.with_name("dependencies")
    dependencies.mkdir()
    for each in Path(sysconfig.get_path("purelib")).iterdir():
        if "greenjobs" not in each.name:
            (dependencies / each.name).symlink_to(each)
    start = f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({str(dependencies)!r})"
    command = [sys.executable, "-S", "-c", f"{start}\n{code}"]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_migrations_to_ship() -> None:
    assert SQL


def test_the_wheel_carries_every_migration(wheel: zipfile.Path) -> None:
    assert sql_in_wheel(wheel) == SQL


def test_the_wheel_carries_every_module(wheel: zipfile.Path) -> None:
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "greenjobs").rglob("*.py")}
    assert {name for name in wheel_names(wheel) if name.endswith(".py")} == modules


def test_the_wheel_says_that_it_is_typed(wheel: zipfile.Path) -> None:
    assert "greenjobs/py.typed" in wheel_names(wheel)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.Path) -> None:
    assert {name.split("/")[0].partition("-")[0] for name in wheel_names(wheel)} == {"greenjobs"}


def test_the_wheel_carries_the_licence(wheel: zipfile.Path) -> None:
    assert [name for name in wheel_names(wheel) if name.endswith("/LICENSE")]


def test_the_wheel_has_the_version_of_the_code(wheel: zipfile.Path) -> None:
    metadata = next(name for name in wheel_names(wheel) if name.endswith("/METADATA"))
    version = Parser().parsestr(wheel.joinpath(metadata).read_text("utf-8"))["Version"]
    code = "import greenjobs; print(greenjobs.__version__)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert version == shown.stdout.strip()


def test_a_production_install_brings_no_package_of_an_extra(wheel: zipfile.Path) -> None:
    metadata = next(name for name in wheel_names(wheel) if name.endswith("/METADATA"))
    required = Parser().parsestr(wheel.joinpath(metadata).read_text("utf-8")).get_all("Requires-Dist", [])
    always = {each.partition(">")[0] for each in required if "extra ==" not in each}
    expected = {"click", "cronsim", "dataclasses-json", "gevent", "orjson", "psycogreen", "psycopg2-binary"}
    expected |= {"tomli", "tzdata"}
    assert always == expected


def test_the_sdist_carries_every_migration(sdist: Path) -> None:
    assert {file.name: file.read_text(encoding="utf-8") for file in (sdist / "migrations").iterdir()} == SQL


@pytest.mark.parametrize("name", ["setup.py", "LICENSE", "Makefile", "tox.ini", ".ci/venv", "tests/test_packaging.py"])
def test_the_sdist_carries_what_the_tests_need(name: str, sdist: Path) -> None:
    assert (sdist / name).is_file()


def test_a_wheel_made_from_the_sdist_carries_every_migration(sdist: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build("build_wheel", sdist, tmp_path / "wheel")) as archive:
        assert sql_in_wheel(zipfile.Path(archive)) == SQL


def test_an_installed_wheel_loads_its_own_migrations(wheel: zipfile.Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel.root.filename)], check=True, timeout=100)
    assert sorted(json.loads(run_installed(site, LOADED_SQL))) == sorted(SQL.values())


def test_an_editable_install_loads_the_migrations_of_the_checkout(source: Path, tmp_path: Path) -> None:
    """The file that only the copy has shows that it is the copy that was loaded."""
    extra = source / "migrations" / f"{len(SQL) + 1:04}_of_this_test.sql"
    editable = build("build_editable", source, tmp_path / "editable")
    site = tmp_path / "site"
    with zipfile.ZipFile(editable) as archive:
        archive.extractall(site)
    extra.write_text("SELECT 'of this test';\n", encoding="utf-8")
    try:
        loaded = json.loads(run_installed(site, LOADED_SQL))
    finally:
        extra.unlink()
    assert sorted(loaded) == sorted([*SQL.values(), "SELECT 'of this test';\n"])
