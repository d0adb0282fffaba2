"""The command `greenjobs`: makes the process cooperative before anything else is imported, then hands over."""

from __future__ import annotations

from greenjobs import green


def main() -> None:
    """Run the command line."""
    green.patch()
    # Not at the top: what is imported before the patch may keep what the patch replaces.
    from greenjobs.cli import main as run

    run()


if __name__ == "__main__":
    main()
