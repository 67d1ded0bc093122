"""The HTTP server: a port, routes, the checks before them, and the form of each response.

In: a service. Out: OpenAI's and vLLM's routes, metrics and administration. Add a route in `app.py`.
"""
