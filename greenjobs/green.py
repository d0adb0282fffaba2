"""The green edge to psycopg2: gevent's patches, and how a connection waits without holding the event loop.

psycopg2 is C code, which gevent cannot patch; it offers a wait callback instead, one for the whole process. psycogreen
installs one, and ours takes its place to mend two things: an interrupted wait also stops the statement on the server,
and what interrupted it comes out as itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from typing import Any

import gevent
import gevent.monkey
import psycopg2
from gevent.socket import wait_read, wait_write
from gevent.threadpool import ThreadPool
from psycogreen.gevent import patch_psycopg
from psycopg2 import _psycopg, extensions

# What must be patched for jobs to overlap; a process where one of these is not was patched by hand, in part.
_NEEDED_PATCHES = ("socket", "ssl", "time", "select", "threading")

# The two states in which a statement can be under way. While connecting there is nothing to cancel.
_CONNECTED = (extensions.STATUS_READY, extensions.STATUS_BEGIN)

# A server that does not answer for so long is not going to be told. An interrupted job waits for this.
_CANCEL_SECONDS = 2.0
_CANCELLING_THREADS = 16


imported_before: frozenset[str] | None = None
"""The modules that were there when `patch` came; None where it has not, or where somebody else had patched before."""


def patch() -> None:
    """Make the standard library and psycopg2 cooperative; again is harmless. Call it before any other import."""
    global imported_before
    if not gevent.monkey.is_module_patched("socket"):
        imported_before = frozenset(sys.modules)
    gevent.monkey.patch_all()
    # psycogreen's is the documented entry, which other libraries look for; our callback then replaces its callback.
    patch_psycopg()
    extensions.set_wait_callback(_wait)


def missing_patches() -> tuple[str, ...]:
    """What is not cooperative in this process: modules, and "psycopg2"; empty where all is well."""
    missing = tuple(name for name in _NEEDED_PATCHES if not gevent.monkey.is_module_patched(name))
    return missing if extensions.get_wait_callback() is not None else (*missing, "psycopg2")


def has_wait_callback() -> bool:
    """Whether psycopg2 waits by our callback, which stops statements on the server, and not by somebody else's."""
    return extensions.get_wait_callback() is _wait


def _wait(connection: extensions.connection) -> None:
    while True:
        state = connection.poll()
        if state == extensions.POLL_OK:
            return
        try:
            if state == extensions.POLL_READ:
                wait_read(connection.fileno())
            elif state == extensions.POLL_WRITE:
                wait_write(connection.fileno())
            else:
                raise psycopg2.OperationalError(f"unexpected state of a connection while waiting: {state}")
        except BaseException:
            # A timeout, a cancel, the end of the greenlet. psycopg2 closes the connection when this function raises,
            # but the server would go on with the statement and, in autocommit, commit it.
            if connection.status in _CONNECTED:
                _cancel(connection)
            else:
                # Nobody has it yet but this frame, which the traceback keeps alive, and the session with it.
                connection.close()
            raise


def _cancel(connection: extensions.connection) -> None:
    """Stop the statement on the server; libpq opens a second connection for this, and blocks.

    psycopg2's own cancel() keeps the interpreter lock meanwhile, whatever the thread: a server that has gone silent
    would stop the process. Through ctypes the same functions of libpq let go of it.
    """
    libpq = _libpq()
    arguments: tuple[Any, ...]
    # If it fails, the session has ended, and the statement with it.
    if hasattr(libpq, "PQcancelCreate"):
        # Since PostgreSQL 17: encrypted where the connection is.
        request = libpq.PQcancelCreate(connection.pgconn_ptr)
        cancel, free, arguments = libpq.PQcancelBlocking, libpq.PQcancelFinish, (request,)
    else:
        request = libpq.PQgetCancel(connection.pgconn_ptr)
        reason = ctypes.create_string_buffer(256)
        cancel, free, arguments = libpq.PQcancel, libpq.PQfreeCancel, (request, reason, len(reason))

    unasked = [request]

    def ask() -> None:
        while unasked:
            with contextlib.suppress(IndexError):  # given up, and freed, at this moment
                unasked.pop()
                cancel(*arguments)
                free(request)

    if request:
        with gevent.Timeout(_CANCEL_SECONDS, False):  # type: ignore[arg-type]  # the stubs lack it
            threads = _cancelling(gevent.get_hub())
            try:
                asked = threads.spawn(ask)
            except BaseException:  # all of them were busy until the time was up
                with contextlib.suppress(IndexError):
                    unasked.pop()
                    free(request)
                raise
            asked.get()


_cancelling_threads: dict[Any, ThreadPool] = {}


def _cancelling(hub: Any) -> ThreadPool:
    """Threads of their own: those that a silent server keeps are not missed by others, such as look-ups of names."""
    if hub not in _cancelling_threads:
        _cancelling_threads[hub] = ThreadPool(_CANCELLING_THREADS, hub=hub)
    return _cancelling_threads[hub]


def leave(hub: Any) -> None:
    """End what was started for this hub, which is that of the calling thread, and is about to end."""
    threads = _cancelling_threads.pop(hub, None)
    if threads is not None:
        threads.kill()


@functools.cache
def _libpq() -> ctypes.CDLL:
    """The libpq that psycopg2 uses; its functions are found through the module that is linked to it."""
    libpq = ctypes.CDLL(_psycopg.__file__)
    signatures: dict[str, tuple[list[Any], Any]] = {
        "PQcancelCreate": ([ctypes.c_void_p], ctypes.c_void_p),
        "PQcancelBlocking": ([ctypes.c_void_p], ctypes.c_int),
        "PQcancelFinish": ([ctypes.c_void_p], None),
        "PQgetCancel": ([ctypes.c_void_p], ctypes.c_void_p),
        "PQcancel": ([ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int], ctypes.c_int),
        "PQfreeCancel": ([ctypes.c_void_p], None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(libpq, name, None)
        if function is not None:
            function.argtypes, function.restype = arguments, result
    return libpq
