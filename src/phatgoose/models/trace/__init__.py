"""Record which experts a routed model chose, token by token, and read the record back.

In: a routed model and texts. Out: a `Trace`, in memory or in a folder.
"""
