"""How the application is found whose jobs are to be run: as Flask finds it.

`package.module`, `package.module:name`, or `package.module:factory()`; without any, GREENJOBS_APP, then FLASK_APP, then
wsgi.py or app.py in the working directory. Importing the module declares the jobs; an object is looked up, and a
factory called, because applications may declare their jobs no earlier than that.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from greenjobs.errors import ConfigError

EARLY_OPTIONS = ("app", "processes", "max_jobs", "max_memory", "http", "log_level", "log_format")
"""What `greenjobs run` has to know before it loads the application, which therefore cannot say it."""

DEFAULT_FILES = ("wsgi.py", "app.py")
"""What Flask looks for where nothing is named, in its order."""

# What its command puts into the environment, where python-dotenv is installed.
_FILES_OF_FLASK = (".flaskenv", ".env")


def load_application(given: str | None) -> Any:
    """Import what `given` names, or what Flask would find; returns the object named, or the module.

    Raises ConfigError, which says what was looked for and where; errors of the application's own import come as they
    are.
    """
    name = name_of_application(given)
    if name is None:
        raise _no_name()
    module_name, _, expression = name.partition(":")
    module = _import(_module_name(module_name), name)
    return _evaluate(module, expression, name) if expression else module


def name_of_application(given: str | None) -> str | None:
    """What would be loaded: `given`, or what Flask would find; None where there is nothing of the kind."""
    return given or os.environ.get("FLASK_APP") or next((file for file in DEFAULT_FILES if Path(file).is_file()), None)


def _no_name() -> ConfigError:
    unread = next((file for file in _FILES_OF_FLASK if Path(file).is_file()), None)
    hint = "" if unread is None else f"; {unread} is read by the command flask alone, as in `flask greenjobs run`"
    return ConfigError(
        f"no application is named, and there is no {' or '.join(DEFAULT_FILES)} in {Path.cwd()}; name the module that "
        f"declares the jobs: --app myapp.jobs, the environment variable GREENJOBS_APP, or app under [greenjobs] in "
        f"setup.cfg{hint}"
    )


def _module_name(name: str) -> str:
    """The dotted name of a module or of a file, with its folder on the path."""
    path = Path(name.strip())
    if path.suffix == ".py" or os.sep in name:
        if not path.with_suffix(".py").is_file() and not (path / "__init__.py").is_file():
            raise ConfigError(f"app is {name!r}, but there is no such file in {Path.cwd()}")
        path = path.resolve()
        parts = [path.stem if path.stem != "__init__" else path.parent.name]
        folder = path.parent if path.stem != "__init__" else path.parent.parent
        while (folder / "__init__.py").is_file():
            parts.insert(0, folder.name)
            folder = folder.parent
        _put_on_path(str(folder))
        return ".".join(parts)
    if not all(part.isidentifier() for part in name.strip().split(".")):
        raise ConfigError(f"app is {name!r}, which is neither the name of a module nor that of a file")
    _put_on_path(str(Path.cwd()))
    return name.strip()


def _put_on_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _import(module_name: str, given: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the application misses is the application's error, with its own traceback.
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(
                f"app is {given!r}, but there is no module {error.name!r} in {Path.cwd()} or on the Python path"
            ) from None
        raise


def _evaluate(module: Any, expression: str, given: str) -> Any:
    """The object in the module that `name` or `factory("argument")` stands for; nothing else is evaluated."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else None
        target = call.func if call else tree
        if not isinstance(target, ast.Name):
            raise ValueError("only a name, or a call of a name")
        args = [ast.literal_eval(arg) for arg in call.args] if call else []
        kwargs = dict(_keyword(word) for word in call.keywords) if call else {}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"app is {given!r}; after the colon goes a name or a factory's call with plain values, "
            f"such as myapp:app or myapp:create_app(): {error}"
        ) from None
    if not hasattr(module, target.id):
        raise ConfigError(f"app is {given!r}, but module {module.__name__!r} has no {target.id!r}")
    found = getattr(module, target.id)
    if call and not callable(found):
        raise ConfigError(f"app is {given!r}, but {target.id!r} of module {module.__name__!r} is no factory: {found!r}")
    return found(*args, **kwargs) if call else found


def _keyword(word: ast.keyword) -> tuple[str, Any]:
    if word.arg is None:
        raise ValueError("only arguments by name, not **")
    return word.arg, ast.literal_eval(word.value)
