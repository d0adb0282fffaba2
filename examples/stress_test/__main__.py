"""`python -m examples.stress_test`: makes the process cooperative before anything else is imported."""

from __future__ import annotations

from greenjobs import green


def main() -> None:
    """Run the stress test."""
    green.patch()
    # Not at the top: what is imported before the patch may keep what the patch replaces.
    from examples.stress_test.command import main as run

    run(prog_name="python -m examples.stress_test")


if __name__ == "__main__":
    main()
