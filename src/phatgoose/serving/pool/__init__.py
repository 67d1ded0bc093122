"""Which experts a server answers with, under which names, and how that changes while it runs."""
