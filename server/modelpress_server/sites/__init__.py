"""Where tasks are done: on this machine, or on the nodes of a cluster."""
