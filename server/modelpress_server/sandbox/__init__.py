"""How a worker is confined: levels that are tried on this kernel, and a user of its own where that may be given."""
