"""Other job queues: comparison.py says which and how, with_*.py are the programs that drive them."""
