"""As in Celery."""
