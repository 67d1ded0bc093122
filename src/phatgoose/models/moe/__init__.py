"""Layers inside mixture-of-experts (MoE) bases, which transformers keeps in 3-D parameters.

In: an experts module. Out: an `ExpertLinear` for each of its linear layers, which takes hooks like any module.

transformers 4 had one `nn.Linear` for every layer of every expert: `mlp.experts.7.gate_proj`. transformers 5 fuses all
experts of a block into one module with two parameters: `mlp.experts.gate_up_proj` [experts, 2·d_ff, d], which holds
each expert's gate_proj and up_proj, and `mlp.experts.down_proj` [experts, d, d_ff]. (Some architectures store the
transposes.) PEFT adapts these through `target_parameters`, or old adapters name the old modules. Nothing in such a
model has a forward hook for one expert's layer, but routing, training and traces need exactly that. So:

- `names.py` finds which layer a path means, under the new names or those of an older checkpoint, and gives the same
  layer one name in the whole pool;
- `expert_linear.py` makes a stand-in module for it, and runs a fused module expert by expert while a stand-in has
  hooks;
- `stand_in.py` does the same for the product inside the mixture's own router.

A stand-in has the sizes, weight and bias of its layer, owns no tensors, and leaves the model's modules and state dict
alone.
"""
