"""The request bodies of OpenAI's and vLLM's APIs, and their error responses.

In: JSON. Out: validated requests, or an APIError. To add a request parameter, add a field to `schema.py` and use it in
`serving/requests.py`; list a parameter that isn't honoured in `unsupported.toml`.
"""
