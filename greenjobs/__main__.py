"""The command `greenjobs`: makes the process cooperative before anything else is imported, then hands over.

A supervisor is the exception: it runs no jobs, and needs nothing of that.
"""

from __future__ import annotations

import os
import sys

from greenjobs.order import order_in
from greenjobs.supervisor import supervise


def main() -> None:
    """Run the command line."""
    _open_missing_streams()
    order = order_in(sys.argv[1:])
    if order is not None:
        sys.exit(supervise(order))
    # Not at the top: gevent is not for a supervisor, and what is imported before the patch may keep what it replaces.
    from greenjobs import green

    green.patch()
    from greenjobs.cli import main as run

    run()


def _open_missing_streams() -> None:
    """Some who start daemons close the standard streams. Their numbers would be those of the first connections, and
    what a library of the application prints in C would be part of what is said to the database."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # What is opened has the lowest number that is free.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # for as long as the process lives


if __name__ == "__main__":
    main()
