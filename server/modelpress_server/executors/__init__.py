"""How a task reaches a worker process."""
