"""Serve a pool over HTTP, as OpenAI's API does. Needs the extra `phatgoose[serve]`.

`http/` receives requests, `api/` says what they may hold, `service.py` with `requests.py` turns them into jobs, `pool/`
finds the experts, and `engine/` runs the model. To add a parameter of requests, start in `api/`.
"""
