"""Django looks for the backend here."""

from __future__ import annotations

from typing import Any

from django.db.backends.postgresql import base


class Wrapped:
    """Has all that a connection has, and is none that libpq could be asked of."""

    def __init__(self, connection: Any) -> None:
        self.__dict__["wrapped"] = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.wrapped, name, value)


class DatabaseWrapper(base.DatabaseWrapper):  # type: ignore[misc]
    """PostgreSQL, at one remove."""

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        return Wrapped(super().get_new_connection(conn_params))

    def ensure_timezone(self) -> bool:
        return False
