"""What a shop is about."""

from __future__ import annotations

from django.db import models


class Order(models.Model):  # type: ignore[misc]
    """Somebody wants something."""

    customer = models.TextField()
