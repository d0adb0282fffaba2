"""greenjobs: background jobs for synchronous Python, in PostgreSQL, on gevent."""

from __future__ import annotations

__version__ = "0.1.0"
