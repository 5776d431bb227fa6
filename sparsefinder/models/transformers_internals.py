"""Every use of what transformers does not promise to keep; where a new version breaks something, it is here.

Public, and used where it is needed: what ``transformers`` itself exports, and the names of a model's modules and parameters,
which are the format of its checkpoints. Not public, and only here: submodules of transformers, and names with an underscore.
Imports nothing of the kind until it is asked for, and of this package nothing: LSG checkpoints carry a copy of this file.
"""

from __future__ import annotations

import copy
import sys
from importlib import import_module
from typing import Any

_AUTO_TABLES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "AutoModelForNextSentencePrediction": "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",
    "AutoModelForPreTraining": "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}


def auto_classes(model_type: str) -> dict[str, str]:
    """The class behind each Auto class of a `model_type`: ``{"AutoModelForMaskedLM": "RobertaForMaskedLM", …}``."""
    tables = import_module("transformers.models.auto.modeling_auto")
    names = {auto: getattr(tables, table).get(model_type) for auto, table in _AUTO_TABLES.items()}
    return {auto: name for auto, name in names.items() if name is not None}


def trackers() -> dict[str, bool]:
    """Every tracker of experiments that the Trainer knows, and whether its package is installed here."""
    integrations = import_module("transformers.integrations.integration_utils")
    installed = integrations.get_available_reporting_integrations()
    installed += ["flyte"] if integrations.is_flytekit_available() else []  # which transformers forgets to list
    return {name: name in installed for name in sorted({*integrations.INTEGRATION_TO_CALLBACK, *installed})}


def class_beside(made: type, name: str) -> Any:
    """A class of the module that defines ``made``, such as ``BartEncoder`` beside ``BartModel``; it is exported nowhere."""
    return getattr(sys.modules[made.__module__], name)


def nystromformer_attention() -> type:
    """The self-attention of Nyströmformer, which holds its number of landmarks."""
    module = import_module("transformers.models.nystromformer.modeling_nystromformer")
    attention: type = module.NystromformerSelfAttention
    return attention


def activations() -> Any:
    """Activation functions by the names that a `config.json` may give, such as ``gelu``."""
    return import_module("transformers.activations").ACT2FN


def cached_file(name_or_path: str, file: str, **options: Any) -> str:
    """Where a file of a folder or of a repository of the hub lies on this machine. Raises `OSError` if there is none."""
    return str(import_module("transformers.utils").cached_file(name_or_path, file, **options))


def attention_name(config: Any) -> Any:
    """The name of the attention that a model with this configuration calls."""
    return config._attn_implementation


def forget_attention(config: Any) -> None:
    """Let a model that is loaded with this configuration have transformers' default attention."""
    config._attn_implementation = None


def copy_with_attention(config: Any, name: str) -> Any:
    """A copy of a configuration for modules that call the attention ``name``, whatever the rest of their model calls.

    Set below the property, which would ask the whole model and the configurations inside this one.
    """
    private = copy.copy(config)
    private._attn_implementation_internal = name
    return private


def weights_are_collected() -> bool:
    """Whether the model that is running was asked for its attention weights; True where that is not known."""
    try:
        collector = import_module("transformers.utils.output_capturing")._active_collector.get()
    except (ImportError, AttributeError):
        return True
    return collector is not None and any("attentions" in key for key in collector)


def is_remote_code(model: Any) -> bool:
    """Whether the class of ``model`` was loaded by `trust_remote_code`; transformers copies its code when it is saved."""
    return model._auto_class is not None
