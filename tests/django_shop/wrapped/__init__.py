"""A backend of Django's as tools of monitoring have them, whose connections are not psycopg2's."""
