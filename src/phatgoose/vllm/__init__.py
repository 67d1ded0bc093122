"""A plugin that lets vLLM serve a pool by routing its linear layers (docs/vllm.md).

In: a pool's folder and a router, from vLLM's options. Out: vLLM's layers with the routed updates added.
`plugin` and `config` are what vLLM sees. The other files can be imported without vLLM.
"""
