"""What must not go wrong when processes, servers and networks do: real processes, real faults, and a ledger."""
