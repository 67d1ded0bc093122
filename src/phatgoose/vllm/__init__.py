"""A plugin that lets vLLM serve a pool: every adapted linear of the base is routed. See docs/vllm.md.

`settings`, `check`, `slices` and `site` need no vLLM; `plugin`, `config` and `method` are what vLLM sees.
"""
