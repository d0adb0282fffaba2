"""Programs that are measured, each in a process of its own; they read an order, say they are ready, and report."""
