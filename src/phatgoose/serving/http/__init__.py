"""The HTTP server: a port, routes, who may come in, and the form of each response."""
