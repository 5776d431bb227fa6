"""LSG models: transformers' own classes with global tokens before the text and LSG attention in the encoder.

`LSGRobertaModel`, `LSGRobertaForMaskedLM`, … are made on demand from the rows of `families`. Nothing of a plain model is
copied. Its encoder gets three things:

1. a table of learned global tokens (512 rows, the first `num_global_tokens` are used), put before the embedded text,
   before the layer norm of the embeddings where there is one;
2. LSG attention in its self-attention modules, through transformers' attention interface;
3. an end that takes the global tokens off again, or hands them to the decoder.

Parameters have the names of the published LSG checkpoints. Settings are read from the model's configuration in every forward
pass, so that one changed there takes effect everywhere. The hidden states of the layers are those of the text, N tokens each,
and of the first token its own; only the last has the global token's there (`pool_with_global`). Departures from the published
models:

1. Padding to whole blocks happens inside the attention, so no other layer computes on it (except where padding can be
   seen, `bos_pooling_sees_padding`).
2. `mask_first_token` hides the first token from the decoder too, whether or not a mask is given; the published encoder
   writes into the caller's mask, so its decoder sees the first token only when there is none.
3. A decoder (`is_decoder=True`) recomputes the whole text at each step of generation: blocks and sparse keys move as it grows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, GenerationMixin

from sparsefinder.errors import UserError
from sparsefinder.executors.local_sparse_global.settings import MAX_GLOBAL_TOKENS
from sparsefinder.lsg.configuration import config_class
from sparsefinder.lsg.families import FAMILIES, Family, plain_class
from sparsefinder.lsg.input_and_output import (
    fill_up,
    global_rows,
    layers_of_text,
    no_positions_in_front,
    positions_of_text,
    put_globals_in_front,
    take_globals_off,
    turn_of,
)
from sparsefinder.lsg.inputs import padding_that_counts, real_tokens, refuse_attentions, refuse_cache
from sparsefinder.models.transformers_internals import class_beside, copy_with_attention, is_remote_code

log = logging.getLogger(__name__)

ATTENTION_NAME = "lsg"


def lsg_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `(B, H, N, D)` → `((B, N, H, D), None)`; `attention_mask (B, 1, 1, N)` bool."""
    if not hasattr(module, "lsg"):
        raise UserError(f"{type(module).__name__} has no LSG settings; load the model with sparsefinder.lsg instead")
    if attention_mask is None:
        valid = query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool)
    else:
        valid = attention_mask[:, 0, -1]
    output = module.lsg()(query, key, value, valid, module.lsg_layer, dropout)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, lsg_attention_forward)


class LSGPreTrained:
    """What every LSG class has: its family, and that its saved folders carry the code that loads them."""

    lsg_family: ClassVar[Family]

    def save_pretrained(self: Any, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers, and the modelling code beside the weights, so that `trust_remote_code=True` loads it."""
        from sparsefinder.lsg.export import auto_map, write_code

        if not is_remote_code(self):  # code loaded from a folder is copied by transformers itself
            self.config.auto_map = auto_map(self.lsg_family)
            write_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]


class LSGEncoderModel(LSGPreTrained):
    """Base model of an encoder family (BERT and its relatives)."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        family = self.lsg_family
        if getattr(config, "gradient_checkpointing", False):  # taken off where it was done
            log.warning("gradient_checkpointing has no effect: transformers has none for %s", family.stem)
        stack = getattr(self, family.stack)
        width = self.embeddings.word_embeddings.embedding_dim
        self.embeddings.global_embeddings = nn.Embedding(MAX_GLOBAL_TOKENS, width)
        self.embeddings.register_forward_hook(partial(put_globals_in_front, config))
        stack.register_forward_pre_hook(fill_up, with_kwargs=True)
        stack.register_forward_hook(partial(take_globals_off, config))
        install_attention(stack, family, config)
        self.post_init()

    def forward(self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """As the plain model's.

        Args:
            input_ids: `(B, N)` int64, or None where `inputs_embeds` is given.
            attention_mask: `(B, N)`, nonzero on real tokens; None: all are.
            **inputs: what else the plain model takes.

        Returns:
            The plain model's output, of the text alone, without the global tokens.
        """
        refuse_attentions(self.config, inputs)
        inputs["input_ids"] = input_ids
        valid = real_tokens(
            self.config, self.lsg_family.tokens(self.config), input_ids, inputs.get("inputs_embeds"), attention_mask
        )
        tokens = valid.shape[1]
        turn = None if attention_mask is None else turn_of(valid)
        if turn is not None:
            valid = turn.turned(valid)
            for name in ("input_ids", "inputs_embeds", "position_ids", "token_type_ids"):
                if inputs.get(name) is not None:
                    inputs[name] = turn.turned(inputs[name])
        if getattr(self.config, "is_decoder", False):
            refuse_cache(inputs.get("past_key_values"))
            inputs["use_cache"] = False
            inputs["past_key_values"] = None
        # four dimensions: transformers hands such a mask on as it is, and builds no N × N one
        mask = F.pad(valid, (self.config.num_global_tokens, 0), value=True)[:, None, None]
        fill = padding_that_counts(self.config, tokens)
        as_tuple = not _returns_dict(self.config, inputs)
        output = super().forward(attention_mask=F.pad(mask, (0, fill)), return_dict=True, **inputs)  # type: ignore[misc]
        before = output.last_hidden_state
        text = before[:, :tokens]
        text = text if turn is None else turn.unturned(text)
        output.hidden_states = layers_of_text(output.hidden_states, before, text, tokens + fill, turn)
        output.last_hidden_state = text
        return output.to_tuple() if as_tuple else output


class LSGEncoderStack(LSGPreTrained):
    """Encoder of an encoder-decoder family (BART and its relatives)."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.global_embeddings = nn.Embedding(MAX_GLOBAL_TOKENS, config.d_model)
        self.embed_positions.register_forward_pre_hook(partial(positions_of_text, config))
        self.embed_positions.register_forward_hook(partial(no_positions_in_front, config))
        install_attention(self, self.lsg_family, config)
        self.post_init()

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the plain encoder's; with `pass_global_tokens_to_decoder` the global tokens precede the output."""
        refuse_attentions(self.config, kwargs)
        count = self.config.num_global_tokens
        valid = real_tokens(self.config, self.lsg_family.tokens(self.config), input_ids, inputs_embeds, attention_mask)
        tokens = valid.shape[1]
        fill = padding_that_counts(self.config, tokens)
        scale = getattr(
            self, "embed_scale", 1.0
        )  # Pegasus scales in its forward pass, BART and mBART inside `embed_tokens`
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) * scale
        turn = None if attention_mask is None else turn_of(valid)
        if turn is not None:
            inputs_embeds, valid = turn.turned(inputs_embeds), turn.turned(valid)
        if fill:
            token = torch.full((1, 1), self.config.pad_token_id, device=inputs_embeds.device)
            after = self.embed_tokens(token) * (scale if input_ids is not None else 0.0)
            inputs_embeds = torch.cat([inputs_embeds, after.expand(valid.shape[0], fill, -1)], dim=1)
        globals_ = global_rows(self.global_embeddings, count, inputs_embeds).expand(inputs_embeds.shape[0], -1, -1)
        as_tuple = not _returns_dict(self.config, kwargs)
        output = super().forward(  # type: ignore[misc]
            inputs_embeds=torch.cat([globals_.to(inputs_embeds.dtype), inputs_embeds], dim=1),
            attention_mask=F.pad(F.pad(valid, (count, 0), value=True), (0, fill))[:, None, None],
            return_dict=True,
            **kwargs,
        )
        before = output.last_hidden_state
        passed = count if self.config.pass_global_tokens_to_decoder else 0
        states = before if passed else take_globals_off(self.config, self, (), output).last_hidden_state
        text = states[:, passed : passed + tokens]
        text = text if turn is None else turn.unturned(text)
        output.hidden_states = layers_of_text(output.hidden_states, before, text, tokens + fill, turn)
        output.last_hidden_state = torch.cat([states[:, :passed], text], dim=1)
        return output.to_tuple() if as_tuple else output


class LSGEncoderDecoderModel(LSGPreTrained):
    """Base model of an encoder-decoder family: an LSG encoder and the plain decoder."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        checkpointing = getattr(config, "gradient_checkpointing", False)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if checkpointing:  # the plain model has taken it off the configuration
            config.gradient_checkpointing = True
        self.encoder = model_class(f"LSG{self.lsg_family.stem}Encoder")(config)
        self.post_init()

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the plain model's; the mask is the text's, without the global tokens."""
        decoded = kwargs.get("decoder_inputs_embeds") if decoder_input_ids is None else decoder_input_ids
        longest = self.config.max_position_embeddings  # the decoder's, too
        if decoded is not None and decoded.shape[1] > longest:
            raise UserError(
                f"decoder input of {decoded.shape[1]} tokens, and the decoder's longest is {longest}; cut it (truncation=True)"
            )
        as_tuple = not _returns_dict(self.config, kwargs)
        if encoder_outputs is None:
            wanted = {name: value for name, value in kwargs.items() if name.startswith("output_")}
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, return_dict=True, **wanted)
        output = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=self._mask_of_decoder(attention_mask, encoder_outputs[0]),
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        return output.to_tuple() if as_tuple else output

    def _mask_of_decoder(self: Any, attention_mask: Tensor | None, states: Tensor) -> Tensor | None:
        """Which encoder states the decoder may see, `(B, N)` or `(B, G + N)`; None for all."""
        count = self.config.num_global_tokens if self.config.pass_global_tokens_to_decoder else 0
        if self.config.mask_first_token:
            if attention_mask is None:
                attention_mask = states.new_ones(states.shape[0], states.shape[1] - count, dtype=torch.long)
            attention_mask = attention_mask.clone()
            attention_mask[torch.arange(states.shape[0]), (attention_mask != 0).int().argmax(-1)] = 0
        return attention_mask if attention_mask is None else F.pad(attention_mask, (count, 0), value=1)


class LSGHead(LSGPreTrained):
    """A model with a head, whose base model becomes the LSG one."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        checkpointing = getattr(config, "gradient_checkpointing", False)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        family = self.lsg_family
        plain = getattr(self, self.base_model_prefix)
        if type(plain) is plain_class(family.base):  # the decoders of BART and its relatives have no LSG part
            if checkpointing:  # the plain model has taken it off the configuration
                config.gradient_checkpointing = True
            without_pooler = {"add_pooling_layer": False} if getattr(plain, "pooler", self) is None else {}
            setattr(self, self.base_model_prefix, model_class(f"LSG{family.base}")(config, **without_pooler))
            self.post_init()


class LSGGeneratingHead(LSGHead):
    """A head that generates text."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a decoder without encoder runs without cache (departure 3)."""
        if not self.config.is_encoder_decoder:
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, but RoBERTa counts positions itself, as do its relatives: `generate` forgets reserved rows."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if self.lsg_family.positions == "after_padding":
            inputs.pop("position_ids", None)
        return inputs


def install_attention(stack: nn.Module, family: Family, config: Any) -> None:
    """Let every self-attention of a stack run LSG attention, whatever implementation the rest of the model uses.

    Each holds the way to the attention that the configuration describes, and not that attention, whose settings may change.

    Args:
        stack: changed in place.
        family: tells which modules are self-attentions.
        config: of the LSG model.

    Raises:
        UserError: where its settings are wrong.
    """
    config.lsg_attention()
    private = copy_with_attention(config, ATTENTION_NAME)
    modules = [module for module in stack.modules() if type(module).__name__ == f"{family.stem}{family.attention}"]
    for layer, module in enumerate(modules):
        for attribute, value in (("config", private), ("lsg", config.lsg_attention), ("lsg_layer", layer)):
            setattr(module, attribute, value)


def _returns_dict(config: Any, kwargs: dict[str, Any]) -> bool:
    wanted = kwargs.pop("return_dict", None)
    return bool(config.return_dict if wanted is None else wanted)


def named_as(plain: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which takes its arguments by name, with the signature of `plain`: for callers by position and for tools."""
    names = tuple(signature(plain).parameters)

    @wraps(plain)
    def called(*args: Any, **kwargs: Any) -> Any:
        return forward(args[0], **dict(zip(names[1 : len(args)], args[1:], strict=True)), **kwargs)

    return called


def model_class(name: str) -> Any:
    """An LSG class by its name, for instance `LSGRobertaForMaskedLM`, made once. Raises `AttributeError` for another."""
    return globals().get(name) or _make(name)


def _make(name: str) -> Any:
    family = _family_of_name(name)
    role: type
    plain_name = name.removeprefix("LSG")
    if plain_name == f"{family.stem}Encoder":
        plain, role = class_beside(plain_class(family.base), plain_name), LSGEncoderStack
    else:
        plain = plain_class(plain_name)
        base_role = LSGEncoderDecoderModel if family.encoder_decoder else LSGEncoderModel
        head_role = LSGGeneratingHead if issubclass(plain, GenerationMixin) else LSGHead
        role = base_role if plain_name == family.base else head_role
    namespace = {
        "__module__": __name__,
        "__doc__": f"`{plain_name}` with LSG attention in its encoder ({role.__name__}).",
        "config_class": config_class(family),
        "lsg_family": family,
    }
    if "forward" in vars(role):
        namespace["forward"] = named_as(plain.forward, vars(role)["forward"])
    made = type(name, (role, plain), namespace)
    globals()[name] = made
    return made


def _family_of_name(name: str) -> Family:
    for family in FAMILIES.values():
        known = (*family.architectures(), *((f"{family.stem}Encoder",) if family.encoder_decoder else ()))
        if name.startswith("LSG") and name.removeprefix("LSG") in known:
            return family
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __getattr__(name: str) -> Any:
    if not name.startswith("LSG"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_class(name)
