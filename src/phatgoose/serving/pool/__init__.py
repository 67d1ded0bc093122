"""The experts that a server serves: their names, versions, and changes while it runs.

In: model names of requests, and changes by an administrator or in the pool's folder. Out: routes for the engine.
"""
