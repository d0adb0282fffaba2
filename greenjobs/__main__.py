"""The command `greenjobs`: makes the process cooperative before anything else is imported, then hands over.

A supervisor is the exception: it runs no jobs, and needs nothing of that.
"""

from __future__ import annotations

import sys

from greenjobs import supervisor


def main() -> None:
    """Run the command line."""
    order = supervisor.order_in(sys.argv[1:])
    if order is not None:
        sys.exit(supervisor.supervise(order))
    # Not at the top: gevent is not for a supervisor, and what is imported before the patch may keep what it replaces.
    from greenjobs import green

    green.patch()
    from greenjobs.cli import main as run

    run()


if __name__ == "__main__":
    main()
