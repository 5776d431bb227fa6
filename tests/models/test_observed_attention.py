"""Looking at an attention at work changes nothing, and what is kept belongs to each layer."""

import torch

from sparsefinder.attention import Masked
from sparsefinder.models import plugged
from sparsefinder.models.observed_attention import Recorder, Watched
from sparsefinder.patterns.window import Window
from tests.tiny_models import VOCABULARY, tiny_model


def test_a_watched_attention_gives_what_it_gives_alone() -> None:
    model = tiny_model("roberta")
    ids = torch.randint(5, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    attention, recorder = Masked(Window(3)), Recorder()
    outputs = {}
    with torch.no_grad(), plugged(model, attention):
        expected = model.base_model(input_ids=ids).last_hidden_state

    def look(layer, qk, v, output):
        recorder(layer, qk, v, output)
        outputs[layer] = v, output

    with plugged(model, Watched(attention, look)):
        found = model.base_model(input_ids=ids).last_hidden_state
    assert torch.equal(found, expected)
    assert list(recorder.layers) == [0, 1]
    for layer, qk in recorder.layers.items():
        assert not qk.q.requires_grad
        assert not qk.k.requires_grad
        v, output = outputs[layer]
        assert torch.equal(attention(qk.q, qk.k, v, qk.valid, layer), output)
