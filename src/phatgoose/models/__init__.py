"""Models: load a base, turn text into tokens, attach routing, record what was chosen.

| room | what it does |
|---|---|
| `base/` | a checkpoint → a `Base` |
| `text/` | prompts and conversations → tokens → answers |
| `context/` | which tokens a module sees, and of which prompt |
| `attach/` | `route` and `unroute`: a pool and a router → hooks on a model |
| `moe/` | layers inside a mixture-of-experts base |
| `batched/` | several routings in one forward pass |
| `trace/` | record what a routed model chose |
"""
