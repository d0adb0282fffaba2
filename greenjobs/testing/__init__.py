"""For the tests of an application: run its jobs where they are enqueued, record them, or drain the queue.

    from greenjobs import testing

    with testing.inline():                      # .delay() runs the job here and now
        client.post("/orders")
    with testing.recording():                   # .delay() only notes what was enqueued
        client.post("/orders")
        testing.assert_enqueued(send_email, to="ann@example.com")
    with testing.using(connection):             # .delay() joins the transaction of the test
        client.post("/orders")
        testing.drain()
    testing.perform(send_email, "ann@example.com", attempt=3)

No gevent is needed, and nothing is patched. The modes are of the whole process, so that they hold in the threads of a
live server; they nest, and the innermost counts. The fixtures of pytest are in `greenjobs.pytest_plugin`.
"""

from greenjobs.testing.assertions import assert_enqueued, assert_not_enqueued, enqueued_jobs
from greenjobs.testing.attempts import Ran, perform
from greenjobs.testing.draining import DrainError, drain
from greenjobs.testing.modes import Clock, Inline, Recording, inline, recording, rolled_back, travel, using
from greenjobs.testing.records import EnqueuedJob

__all__ = [
    "Clock",
    "DrainError",
    "EnqueuedJob",
    "Inline",
    "Ran",
    "Recording",
    "assert_enqueued",
    "assert_not_enqueued",
    "drain",
    "enqueued_jobs",
    "inline",
    "perform",
    "recording",
    "rolled_back",
    "travel",
    "using",
]
