"""What OpenAI's and vLLM's APIs say a request may hold, and the errors for what it may not.

A new request parameter is described in `schema.py` and listed in `parameters.py`.
"""
