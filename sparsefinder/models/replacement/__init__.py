"""Another attention in a transformers model: for the length of a block, or until it is taken out.

Everything goes through transformers' attention registry; no model code is copied. One function is registered
(`registered_function`), and what it does is decided by the module it is called from:

- dense attention with the normalizer that the model's configuration remembers (`sparsefinder.models.dense_normalizer`);
- any attention object ``(q, k, v, valid, layer) → output`` where one is plugged into the module (`carried_by_module`): within a
  block (`context_manager`) or from now on (`attach_and_detach`).

Layers are counted by *calls* (`attention_calls`).
"""
