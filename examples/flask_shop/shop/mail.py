"""Mails, over SMTP to the server that the setting SMTP names."""

from __future__ import annotations

import smtplib
from email.message import EmailMessage

from flask import current_app

TIMEOUT_SECONDS = 10


def send(recipient: str, subject: str, body: str, *, message_id: str) -> None:
    """Send a mail, or print it where no server is named. Raises OSError, as all errors of smtplib are."""
    message = EmailMessage()
    message["From"] = current_app.config["SENDER"]
    message["To"] = recipient
    message["Subject"] = subject
    message["Message-ID"] = message_id
    message.set_content(body)
    server = current_app.config["SMTP"]
    if not server:
        print(f"Mail to {recipient}: {subject}: {body}", flush=True)
        return
    host, _, port = server.partition(":")
    with smtplib.SMTP(host, int(port or 25), timeout=TIMEOUT_SECONDS) as smtp:
        smtp.send_message(message)
