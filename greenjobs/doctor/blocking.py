"""Packages whose C code waits outside of gevent: while one job is in it, no other job of its process goes on."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from greenjobs.doctor.case import Case
from greenjobs.doctor.finding import Verdict, ok, warn

_THREADS = 'declare its jobs with @job(executor="thread")'
_FIRST_COOPERATIVE_PSYCOPG = (3, 1, 14)


class _Package(NamedTuple):
    """`module` is the one whose presence says that the C code is there; `waits` may say that it is not in use."""

    name: str
    module: str
    remedy: str
    waits: Callable[[Any], bool] = lambda module: True


def _old_psycopg(module: Any) -> bool:
    numbers = re.findall(r"\d+", str(getattr(module, "__version__", "")))
    return tuple(map(int, numbers[:3])) < _FIRST_COOPERATIVE_PSYCOPG


def _is_thick(module: Any) -> bool:
    return not getattr(module, "is_thin_mode", lambda: True)()


_PACKAGES = (
    _Package(
        "grpc",
        "grpc._cython.cygrpc",
        "call grpc.experimental.gevent.init_gevent() before the first channel, or give its jobs a runner of their own",
        lambda module: "grpc.experimental.gevent" not in sys.modules,
    ),
    _Package("mysqlclient", "MySQLdb", "PyMySQL cooperates, and pymysql.install_as_MySQLdb() takes its place"),
    _Package("mysql.connector in C", "_mysql_connector", "connect with use_pure=True, or take PyMySQL"),
    _Package("psycopg older than 3.1.14", "psycopg", "install psycopg 3.1.14 or later", _old_psycopg),
    _Package("pymssql", "pymssql", "python-tds cooperates; or " + _THREADS),
    _Package("pyodbc", "pyodbc", "a driver in pure Python cooperates; or " + _THREADS),
    _Package("turbodbc", "turbodbc", "a driver in pure Python cooperates; or " + _THREADS),
    _Package("cx_Oracle", "cx_Oracle", "oracledb cooperates, in its thin mode"),
    _Package(
        "oracledb in thick mode", "oracledb", "leave out init_oracle_client(): its thin mode cooperates", _is_thick
    ),
    _Package("ibm_db", "ibm_db", _THREADS),
    _Package("confluent-kafka", "confluent_kafka.cimpl", "poll(0) and time.sleep by turns; or " + _THREADS),
    _Package("pycurl", "pycurl", "requests cooperates; or " + _THREADS),
    _Package("pylibmc", "_pylibmc", "pymemcache cooperates"),
    _Package("python-ldap", "_ldap", "ldap3 cooperates; or " + _THREADS),
    _Package("pyzmq", "zmq.backend.cython", "import zmq.green as zmq", lambda module: "zmq.green" not in sys.modules),
    _Package(
        "cassandra-driver with libev",
        "cassandra.io.libevreactor",
        "name cassandra.io.geventreactor.GeventConnection as connection_class",
    ),
    _Package("aerospike", "aerospike", _THREADS),
    _Package("couchbase", "couchbase", _THREADS),
    _Package("pyarrow.flight", "pyarrow._flight", _THREADS),
)

NAMES = tuple(package.name for package in _PACKAGES)
"""What is known of, as it is called in messages."""

# What computes holds up others, too; but there is nothing wrong with short computations.
_COMPUTING = ("numpy", "pandas", "lxml", "PIL", "torch", "tensorflow", "cv2", "scipy", "sklearn")


def blocking_modules(case: Case) -> Verdict:
    """Which of them the application has loaded."""
    found = [each for each in _PACKAGES if each.module in sys.modules and each.waits(sys.modules[each.module])]
    if found:
        names = ", ".join(package.name for package in found)
        remedies = "; ".join(f"{package.name}: {package.remedy}" for package in found)
        return warn(f"a job that waits in these holds up all others of its process: {names}", remedies)
    computing = [name for name in _COMPUTING if name in sys.modules]
    if computing:
        return ok(
            f"none that waits in C is loaded; what computes for long ({', '.join(computing)}) holds up others, too"
        )
    return ok("none that waits in C is loaded")
