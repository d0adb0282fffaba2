"""How the application is found: by name, by file, by factory, as Flask finds it; and what is said when it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import processes
import pytest

from greenjobs.errors import ConfigError
from greenjobs.loading import load_application


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what is imported from it is forgotten afterwards."""
    modules, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    for variable in ("FLASK_APP", "GREENJOBS_APP"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "path", [each for each in path if each])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def _write(folder: Path, name: str, code: str = "") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    return processes.write_application(file.parent, code, name=file.name)


def _name(found: Any) -> str:
    assert isinstance(found, ModuleType)
    return found.__name__


def test_module_is_found_in_the_working_directory(project: Path) -> None:
    _write(project, "shop_a.py")

    assert _name(load_application("shop_a")) == "shop_a"


def test_module_of_a_package_is_found(project: Path) -> None:
    _write(project, "shop_b/__init__.py")
    _write(project, "shop_b/tasks.py")

    assert _name(load_application("shop_b.tasks")) == "shop_b.tasks"


def test_file_is_found_as_the_module_that_it_is(project: Path) -> None:
    _write(project, "deep/shop_c/__init__.py")
    _write(project, "deep/shop_c/tasks.py", "from shop_c import __name__ as parent")

    assert load_application("deep/shop_c/tasks.py").parent == "shop_c"


def test_folder_of_a_package_is_found(project: Path) -> None:
    _write(project, "deep/shop_d/__init__.py")

    assert _name(load_application("deep/shop_d")) == "shop_d"


def test_absolute_file_is_found(project: Path) -> None:
    file = _write(project, "elsewhere/shop_e.py")

    assert _name(load_application(str(file))) == "shop_e"


@pytest.mark.parametrize("name", ["app.py", "wsgi.py"])
def test_without_a_name_flasks_files_are_found(project: Path, name: str) -> None:
    _write(project, name)

    assert _name(load_application(None)) == name.removesuffix(".py")


def test_wsgi_is_preferred_to_app_as_flask_does(project: Path) -> None:
    _write(project, "app.py")
    _write(project, "wsgi.py")

    assert _name(load_application(None)) == "wsgi"


def test_flask_app_is_what_flask_would_load(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(project, "app.py")
    _write(project, "shop_f.py", "application = 'mine'")
    monkeypatch.setenv("FLASK_APP", "shop_f:application")

    assert load_application(None) == "mine"


def test_given_name_wins_over_flask_app(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(project, "shop_g.py")
    monkeypatch.setenv("FLASK_APP", "nothing")

    assert _name(load_application("shop_g")) == "shop_g"


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("app", "an object"),
        ("create_app()", ((), {})),
        ("create_app('test')", (("test",), {})),
        ('create_app("test", debug=True, sizes=[1, 2])', (("test",), {"debug": True, "sizes": [1, 2]})),
        (" create_app( ) ", ((), {})),
    ],
)
def test_object_or_factory_after_the_colon(project: Path, expression: str, found: Any) -> None:
    _write(
        project,
        "shop_h.py",
        """
        app = "an object"

        def create_app(*args, **kwargs):
            return args, kwargs
        """,
    )

    assert load_application(f"shop_h:{expression}") == found


def test_file_with_a_factory(project: Path) -> None:
    _write(project, "shop_i.py", "def create_app(): return 'made'")

    assert load_application("shop_i.py:create_app()") == "made"


@pytest.mark.parametrize(
    "expression",
    [
        "create_app(",
        "1 + 1",
        "a.b",
        "create_app(name)",
        "create_app(__import__('os').getcwd())",
        "create_app()()",
        "[app]",
        "'app'",
        "lambda: 5",
        "create_app(*[1])",
        "create_app(**{'a': 1})",
        "app; app",
    ],
)
def test_expression_of_any_other_kind_is_refused(project: Path, expression: str) -> None:
    _write(project, "shop_j.py", "app = 1\ndef create_app(*args, **kwargs): raise AssertionError('called')")

    with pytest.raises(ConfigError, match=r"after the colon goes a name or a factory's call"):
        load_application(f"shop_j:{expression}")


def test_missing_object_is_named_with_its_module(project: Path) -> None:
    _write(project, "shop_k.py")

    with pytest.raises(ConfigError, match="module 'shop_k' has no 'app'"):
        load_application("shop_k:app")


def test_factory_that_is_none_is_refused(project: Path) -> None:
    _write(project, "shop_l.py", "create_app = 5")

    with pytest.raises(ConfigError, match="create_app"):
        load_application("shop_l:create_app()")


def test_missing_module_is_named_with_where_it_was_looked_for(project: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no module 'no_such_module' in {project}"):
        load_application("no_such_module.tasks")


def test_missing_submodule_is_named(project: Path) -> None:
    _write(project, "shop_m/__init__.py")

    with pytest.raises(ConfigError, match=r"no module 'shop_m\.tasks'"):
        load_application("shop_m.tasks")


@pytest.mark.parametrize("name", ["no_such_file.py", "no/such/file.py", "no/such/folder"])
def test_missing_file_is_named_with_where_it_was_looked_for(project: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}', but there is no such file in {project}"):
        load_application(name)


@pytest.mark.parametrize("name", ["two words", "a-b", "..", ".tasks", "a..b", "5", ":app", "a:", "ü ö"])
def test_what_is_no_name_of_a_module_is_refused(project: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="app is"):
        load_application(name)


def test_nothing_to_be_found_says_the_ways_to_name_it(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no wsgi\.py or app\.py in .*--app.*GREENJOBS_APP.*setup\.cfg$"):
        load_application(None)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import a_module_that_the_application_misses", ModuleNotFoundError),
        ("from os import nothing_of_this_name", ImportError),
        ("1 / 0", ZeroDivisionError),
        ("def broken(:", SyntaxError),
        ("raise ValueError('mine')", ValueError),
        ("raise TypeError('mine')", TypeError),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else "",
)
def test_error_of_the_applications_own_import_comes_as_it_is(project: Path, code: str, error: type[Exception]) -> None:
    _write(project, "shop_n.py", code)

    with pytest.raises(error):
        load_application("shop_n")


def test_error_of_a_factory_comes_as_it_is(project: Path) -> None:
    _write(project, "shop_o.py", "def create_app(): raise LookupError('mine')")

    with pytest.raises(LookupError, match="mine"):
        load_application("shop_o:create_app()")


def test_module_that_the_application_misses_in_its_own_package_is_the_applications_error(project: Path) -> None:
    """`shop_p` is there; that it imports `shop_p.models`, which is not, is not a wrong --app."""
    _write(project, "shop_p/__init__.py", "import shop_p.models")

    with pytest.raises(ModuleNotFoundError, match=r"shop_p\.models"):
        load_application("shop_p")


@pytest.mark.parametrize("name", [".env", ".flaskenv"])
def test_file_that_only_the_command_of_flask_reads_is_told(project: Path, name: str) -> None:
    (project / name).write_text("FLASK_APP=shop")

    with pytest.raises(ConfigError, match=rf"{name} is read by the command flask alone, as in `flask greenjobs run`"):
        load_application(None)
