"""Another attention in a transformers model: for the length of a block, or until it is taken out.

Everything goes through transformers' attention registry; no model code is copied. One function is registered
(`called_by_transformers`), and what it does is decided by the module it is called from:

- dense attention with the normalizer that the model's configuration remembers (`sparsefinder.models.dense_normalizer`);
- any attention object ``(q, k, v, valid, layer) → output`` where one is plugged into the module (`carried_by_module`): within a
  block (`within_block`) or from now on (`until_detached`).

Layers are counted by *calls* (`attention_calls`).
"""
