"""The application, for `flask run`, `greenjobs run` and `gunicorn app:app`. Whichever comes first makes the tables."""

from shop import create_app, make_tables

app = create_app()
# For a demonstration. Elsewhere this is a step of the deployment, before the new code: `flask greenjobs migrate`, and
# what your application has for its own tables.
make_tables(app)
