"""The file that has settings of ours: the nearest one from the working directory upwards with a section for them.

That is `[greenjobs]` in setup.cfg or `[tool.greenjobs]` in pyproject.toml. Its keys are checked here, not its values.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from greenjobs.errors import ConfigError


class Section(NamedTuple):
    """Our section of a file: its values by option name, as the file's format gives them."""

    file: Path
    heading: str
    values: dict[str, object]

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.heading} in {self.file}"


_PROJECT_MARKS = ("setup.cfg", "pyproject.toml", "setup.py", ".git")


def nearest_section(options: Collection[str]) -> Section | None:
    """The section that counts here, None if there is none.

    Raises ConfigError for a key that is none of the options, a file that cannot be read, or two files with a section.
    """
    for folder in _folders_upwards():
        ours, other = (
            _setup_cfg_section(folder / "setup.cfg", options),
            _pyproject_section(folder / "pyproject.toml", options),
        )
        if ours and other:
            raise ConfigError(f"There are settings in both {ours.label} and {other.label}; keep one of them.")
        if ours or other:
            return ours or other
    return None


def project_folder(section: Section | None) -> Path:
    """The folder of the project that the working directory is in: that of the file with this section; else the nearest
    parent that looks like a project (setup.cfg, pyproject.toml, setup.py or .git); else the working directory itself.
    """
    if section is not None:
        return section.file.parent
    folders = _folders_upwards()
    marked = (each for each in folders if any(os.path.exists(each / mark) for mark in _PROJECT_MARKS))
    return next(marked, folders[0])


def near_match(name: str, options: Collection[str]) -> str:
    """The end of a sentence about a name that is no option: which one was meant, perhaps."""
    # Imported here, as the parsers of files below: a start without such an error is quicker without it.
    import difflib

    near = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {near[0]}?" if near else f"; the options are {', '.join(options)}."


def _folders_upwards() -> tuple[Path, ...]:
    try:
        working = Path.cwd()
    except FileNotFoundError:
        raise ConfigError("The working directory has been removed; change to one that exists.") from None
    return (working, *working.parents)


def _setup_cfg_section(file: Path, options: Collection[str]) -> Section | None:
    text = _text_about_us(file)
    if text is None:
        return None
    import configparser

    # No interpolation: a "%" belongs to an encoded password. No section of defaults: an empty name matches no heading.
    parser = configparser.RawConfigParser(default_section="")
    try:
        parser.read_string(text, source=str(file))
    except configparser.Error as error:
        raise ConfigError(f"{file} cannot be read: {_first_line(error)}") from None
    if not parser.has_section("greenjobs"):
        return None
    return _checked_section(file, "[greenjobs]", parser.items("greenjobs"), options)


def _pyproject_section(file: Path, options: Collection[str]) -> Section | None:
    text = _text_about_us(file)
    if text is None:
        return None
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        tool = tomllib.loads(text).get("tool")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} cannot be read: {_first_line(error)}") from None
    ours = tool.get("greenjobs") if isinstance(tool, dict) else None
    if ours is None:
        return None
    if not isinstance(ours, dict):
        raise ConfigError(f"tool.greenjobs in {file} must be a section, [tool.greenjobs].")
    return _checked_section(file, "[tool.greenjobs]", ours.items(), options)


def _text_about_us(file: Path) -> str | None:
    """The text of a file that mentions greenjobs; None otherwise, so that strangers' files need not even be valid."""
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        # A parent folder that may not be entered shows nothing to us, not even whether there is a file.
        if isinstance(error, PermissionError) and not os.access(file.parent, os.X_OK):
            return None
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    if b"greenjobs" not in content:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} cannot be read: it is not UTF-8 (byte {error.start}).") from None


def _first_line(error: Exception) -> str:
    """The message of a parser's error; what follows its first line quotes the file, passwords included."""
    return str(error).partition("\n")[0]


def _checked_section(
    file: Path, heading: str, items: Iterable[tuple[str, object]], options: Collection[str]
) -> Section:
    section = Section(file, heading, {})
    for key, value in items:
        name = key.replace("-", "_")
        if name not in options:
            raise ConfigError(f"{section.label} has the key {key!r}, which is no option{near_match(name, options)}")
        if name in section.values:
            raise ConfigError(f"{section.label} sets {name} twice; keep one of the two.")
        section.values[name] = value
    return section
