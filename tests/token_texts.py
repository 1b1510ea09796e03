"""Texts to tokenise, and what came of them."""

import json

import numpy as np

from experiments.language.data import Data, prepare

TEXTS = [
    f"Größe {i}: λ={i * i}, 東京🗼{'é' * (i % 7)}\n  def f(x):\n    return x + {i}\n"
    for i in range(400)
]


def jsonl(texts=TEXTS):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(path, content):
    path.write_bytes(content)
    return path


def configured(folder, *files, **settings):
    settings = {"vocabulary": 300, "cache": folder / "cache"} | settings
    return Data(tuple(map(str, files)), **settings)


def prepared_of(folder, texts=TEXTS, **settings):
    return prepare(configured(folder, write(folder / "a.jsonl", jsonl(texts)), **settings))


def texts_of(tokens):
    """The documents to train on and those held out, whose bytes are those of their tokens."""
    sides = []
    for ids in map(np.concatenate, (tokens.train, tokens.validation)):
        *rows, rest = np.split(ids, np.flatnonzero(ids == tokens.end_of_text) + 1)
        assert not rest.size
        texts = [tokens.tokenizer.decode(row[:-1].tolist()) for row in rows]
        sizes = [tokens.bytes_per_token[row].sum() for row in rows]
        assert sizes == [len(text.encode()) for text in texts]
        sides.append(texts)
    return sides


def all_texts(tokens):
    train, validation = texts_of(tokens)
    return sorted(train + validation)
