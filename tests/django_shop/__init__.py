"""An app with one model, for the tests of Django that run in the test process."""
