"""The experts that a server serves: under which names, in which version, and how they change while it runs.

In: model names of requests, and changes by an administrator or in the pool's folder. Out: routes for the engine.
"""
