"""Record which experts a routed model chose, token by token, and read the record back.

In: a routed model and its calls. Out: a `Trace`, in memory or in a file. `record.py` has `trace()`; `recorder.py`
runs inside the model; `passes.py` holds what it hasn't summed up yet; `result.py` and `choices.py` are the result,
`files.py` its file and table.
"""
