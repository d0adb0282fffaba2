"""The command `greenjobs`: makes the process cooperative before anything else is imported, then hands over.

A supervisor is the exception: it runs no jobs, and needs nothing of that.
"""

from __future__ import annotations

import sys

from greenjobs.order import order_in
from greenjobs.supervisor import supervise


def main() -> None:
    """Run the command line."""
    order = order_in(sys.argv[1:])
    if order is not None:
        sys.exit(supervise(order))
    # Not at the top: gevent is not for a supervisor, and what is imported before the patch may keep what it replaces.
    from greenjobs import green

    green.patch()
    from greenjobs.cli import main as run

    run()


if __name__ == "__main__":
    main()
