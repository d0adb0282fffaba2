"""`gunicorn app:app`. Its workers enqueue; what they enqueue is run by `greenjobs run`, another process."""

import os

bind = f"127.0.0.1:{os.environ.get('PORT', '5000')}"
workers = 2
worker_class = "gthread"
threads = 8
# Saves memory: the application is imported once, before the workers are forked. greenjobs notices the fork, and opens
# connections of its own in every worker.
preload_app = True
