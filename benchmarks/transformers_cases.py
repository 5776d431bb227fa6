"""What `transformers_tests.py` hands to transformers' own common model tests: tiny models of one family, LSG or plain.

Not to be run itself: it needs the tests of transformers' source distribution beside it. ``FAMILY`` and ``KIND`` (lsg, plain) name
what is tested.
"""

import os
from importlib import import_module
from typing import Any
from unittest import TestCase

import torch
from torch import Tensor

from sparsefinder.lsg import config_class, model_class
from sparsefinder.lsg.families import FAMILIES, plain_class

FAMILY, LSG = FAMILIES[os.environ["FAMILY"]], os.environ["KIND"] == "lsg"
COMMON = import_module("tests.test_modeling_common")
GENERATION = import_module("tests.generation.test_utils")

BASE = {"vocab_size": 99, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 40}
BASE |= {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "decoder_start_token_id": 2, "forced_eos_token_id": None,
         "dropout": 0.1, "attention_dropout": 0.1} if FAMILY.encoder_decoder else (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37} if FAMILY.name == "distilbert" else
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "type_vocab_size": 4,
         **({"embedding_size": 16, "num_hidden_groups": 1} if FAMILY.name in ("albert", "electra") else {})})  # fmt: skip
BLOCKS = {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 2, "num_global_tokens": 2}


def made(name: str) -> Any:
    """A class of the family, of the kind that is tested."""
    return model_class(f"LSG{name}") if LSG else plain_class(name)


def name_the_classes() -> None:
    """Tests ask transformers' tables what a class is for (does it need labels?); LSG classes are not in them."""
    for table in (getattr(COMMON, name) for name in dir(COMMON) if name.endswith("_MAPPING_NAMES")):
        if FAMILY.name in table:
            table[FAMILY.model_type] = f"LSG{table[FAMILY.name]}"


class Tester:
    """What the tests ask for: a configuration and inputs, five blocks long, so that attention is not dense."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads, num_choices = 3, 21, 32, 2, 4, 2
    encoder_seq_length = decoder_seq_length = seq_length
    is_training, pad_token_id = True, 1

    def __init__(self, parent: TestCase) -> None:
        self.parent = parent

    def get_config(self) -> Any:
        made_of = config_class(FAMILY) if LSG else plain_class(f"{FAMILY.stem}Config")
        return made_of(**BASE, **(BLOCKS if LSG else {}))

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        ids = torch.randint(5, 99, (self.batch_size, self.seq_length))
        ids[:, -1] = 2  # heads of encoder-decoders that classify read the end of the text
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if FAMILY.encoder_decoder:
            inputs |= {"decoder_input_ids": ids.clone(), "decoder_attention_mask": torch.ones_like(ids)}
        return self.get_config(), inputs


def classes() -> tuple[Any, ...]:
    """Every model class, but decoders alone, which are the plain ones in an encoder-decoder family."""
    skipped = ("ForCausalLM", "LMHeadModel")
    return tuple(
        made(name) for name in dict.fromkeys((FAMILY.base, *FAMILY.architectures())) if not name.endswith(skipped)
    )


class CommonTest(COMMON.ModelTesterMixin, GENERATION.GenerationTesterMixin, TestCase):  # type: ignore[misc,name-defined]
    """transformers' common tests of every model class of the family."""

    all_model_classes = classes()
    is_encoder_decoder = FAMILY.encoder_decoder
    has_attentions = not LSG  # refused by LSG models, in one line: docs/reference/lsg.md
    test_mismatched_shapes = True

    @classmethod
    def setUpClass(cls) -> None:
        name_the_classes()
        super().setUpClass()

    def setUp(self) -> None:
        self.model_tester = Tester(self)

    def _prepare_for_class(self, inputs: Any, model_class: Any, return_labels: bool = False) -> Any:
        inputs = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            second = {"bert": "next_sentence_label", "albert": "sentence_order_label"}.get(FAMILY.name)
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            inputs |= {second: torch.zeros(len(inputs["labels"]), dtype=torch.long)} if second else {}
        return inputs


if not CommonTest.all_model_classes[-1].can_generate() and not any(
    c.can_generate() for c in CommonTest.all_model_classes
):
    CommonTest.__bases__ = (COMMON.ModelTesterMixin, TestCase)
