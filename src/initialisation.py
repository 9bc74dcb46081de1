"""First weights: those of a checkpoint, or ones that know what counting knows, so that pre-training does not begin on a plateau.

Drawn at random, a T5 of this size spends its first millions of tokens little below a unigram model's loss: attention has nothing to look
for before embeddings say which tokens are alike, and embeddings get no clear gradient before attention looks anywhere. Three things,
taken from the corpus and from the shape of the task, break that circle; the checkpoint stays a plain T5:

    embeddings        principal directions of which tokens stand beside which in the training texts
    cross-attention   queries equal to keys, so a sentinel in the decoder finds the same sentinel in the encoder
    position biases   nearer tokens count more, in each head over another range

The price is some seconds of counting at the start.
"""

import math
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from sklearn.utils.extmath import randomized_svd
from torch import nn
from transformers import T5Config
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from src.attention import relative_position_bucket
from src.config import ModelSettings
from src.modeling_t5 import T5ForConditionalGeneration
from src.t5_layers import T5Attention
from src.tokenizer import MODEL_FILE, WORD_START, TokenizedDocuments
from src.verified_folders import describe_file, file_sha256

NEIGHBOUR_WEIGHTS = (1.0, 0.5)  # of the next token and of the one after it
MOST_TOKENS, CHUNK = 20_000_000, 4_000_000  # that are counted in all and at once
CONTEXT_SMOOTHING = 0.75  # of context counts, and 0.5 for singular values: Levy, Goldberg and Dagan 2015, TACL 3, section 3
SELF_SCORE = 16.0  # attention score of a normed state with itself; scores at random have a variance of SELF_SCORE**2 / d_kv
STEEPEST_SLOPE, SLOPE_RANGE = 1.0, 16.0  # position bias per token of distance in the first head, and its ratio to the last head's
LOWEST_BIAS = -8.0


class InitialisationError(ValueError):
    """A checkpoint that pre-training cannot go on from."""


class InformedStart:
    """Sets a model's first weights from training documents; call it with the model.

    Args:
        documents: what the model will be trained on, and nothing else.
        config: of the model.
        seed: of the random projections of the decomposition.
    """

    sources: tuple[dict[str, Any], ...] = ()  # beside the documents

    def __init__(self, documents: TokenizedDocuments, config: T5Config, seed: int) -> None:
        self.documents, self.config, self.seed = documents, config, seed

    @cached_property
    def counts(self) -> scipy.sparse.csr_matrix:
        return neighbour_counts(self.documents, self.config.vocab_size)

    @cached_property
    def vectors(self) -> np.ndarray:
        """One vector of RMS 1 a token, zero where a token was not seen: float32 (vocab_size, d_model or what the counts can give)."""
        vectors = neighbourhood_vectors(self.counts, self.config.d_model, self.seed)
        size = np.sqrt(np.square(vectors).mean(1, keepdims=True))
        return np.divide(vectors, size, out=np.zeros_like(vectors), where=size > 1e-6 * size.max())

    @torch.no_grad()
    def __call__(self, model: T5ForConditionalGeneration) -> None:
        for block in model.decoder.block:
            align_queries_with_keys(block.layer[1].EncDecAttention)
        for stack in (model.encoder, model.decoder):
            prefer_near_tokens(stack.block[0].layer[0].SelfAttention.relative_attention_bias, stack.config)
        vectors = torch.from_numpy(self.vectors)
        seen = vectors.any(1)
        model.shared.weight[seen, : vectors.shape[1]] = vectors[seen].to(model.shared.weight)  # other tokens keep what was drawn

    def nearest_tokens(self, tokenizer: Any, tokens: int = 8, nearest: int = 6, every: int = 12) -> pd.DataFrame:
        """For every twelfth of the commonest longer words, the tokens with the closest vectors (cosine): columns `token`, `nearest`."""
        pieces = np.array(tokenizer.convert_ids_to_tokens(range(self.config.vocab_size)))
        seen = np.flatnonzero(self.vectors.any(1))
        common = seen[np.asarray(self.counts.sum(1)).ravel()[seen].argsort()[::-1]]
        words = [i for i in common if pieces[i].startswith(WORD_START) and pieces[i][1:].isalpha() and len(pieces[i]) > 5]
        rows = []
        for word in words[: every * tokens : every]:
            order = seen[(self.vectors[seen] @ self.vectors[word]).argsort()[::-1]]
            close = [pieces[i].replace(WORD_START, "") for i in order if i != word][:nearest]
            rows.append({"token": pieces[word].replace(WORD_START, ""), "nearest": ", ".join(close)})
        return pd.DataFrame(rows)


class CheckpointStart:
    """Sets a model's first weights to those of a checkpoint, so that pre-training goes on from there; call it with the model.

    Args:
        folder: a T5 checkpoint with its tokenizer.
        tokenizer_folder: where the tokenizer lies that the documents were encoded by.
        config: of the model.

    Raises:
        InitialisationError: no checkpoint, or one of other widths or of another tokenizer, to which the same ids are other tokens.
    """

    def __init__(self, folder: Path, tokenizer_folder: Path, config: T5Config) -> None:
        for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME, MODEL_FILE):
            if not (folder / name).is_file():
                raise InitialisationError(f"{folder / name} is missing: pretraining.initialisation takes a checkpoint and its tokenizer")
        if file_sha256(folder / MODEL_FILE) != file_sha256(tokenizer_folder / MODEL_FILE):
            raise InitialisationError(f"{folder} has another tokenizer than the dataset: set corpus.tokenizer={folder} and run notebook 1")
        theirs = T5Config.from_pretrained(folder)
        for name in (field.name for field in fields(ModelSettings) if field.name != "dropout_rate"):
            if (value := getattr(theirs, name)) != getattr(config, name):
                raise InitialisationError(f"{folder} has {name} {value}, not {getattr(config, name)}: set model.{name}={value}")
        if theirs.vocab_size != config.vocab_size:
            padded = f"{folder} has a vocabulary of {theirs.vocab_size} rows for the {config.vocab_size} tokens of its tokenizer"
            raise InitialisationError(f"{padded}: save it with resize_token_embeddings({config.vocab_size})")
        self.folder, self.sources = folder, (describe_file(folder / SAFE_WEIGHTS_NAME),)

    def __call__(self, model: T5ForConditionalGeneration) -> None:
        model.load_state_dict(T5ForConditionalGeneration.from_pretrained(self.folder, dtype=torch.float32).state_dict())


def align_queries_with_keys(attention: T5Attention) -> None:
    """W_Q = W_K, of a size that gives a state of RMS 1 the score `SELF_SCORE` with itself (T5 does not divide by sqrt(d_kv))."""
    d_kv = attention.k.out_features // attention.num_heads
    attention.k.weight.mul_(math.sqrt(SELF_SCORE / d_kv))  # drawn so that each entry of a key has variance 1
    attention.q.weight.copy_(attention.k.weight)


def prefer_near_tokens(table: nn.Embedding, config: T5Config) -> None:
    """A bias that falls linearly with distance, in each head at another slope (as ALiBi's, arXiv 2108.12409), but learned from there on."""
    num_buckets, num_heads = table.weight.shape
    farthest = config.relative_attention_max_distance
    distances = torch.arange(-farthest, farthest + 1)
    buckets = relative_position_bucket(distances, not config.is_decoder, num_buckets, farthest)
    nearest = torch.full((num_buckets,), farthest).scatter_reduce(0, buckets, distances.abs(), "amin")  # distance at which a bucket begins
    slopes = STEEPEST_SLOPE * SLOPE_RANGE ** (-torch.arange(num_heads) / max(1, num_heads - 1))
    table.weight.copy_((-nearest[:, None] * slopes).clamp_min(LOWEST_BIAS))  # (num_buckets, num_heads)


def neighbour_counts(documents: TokenizedDocuments, vocab_size: int) -> scipy.sparse.csr_matrix:
    """How often token j stands behind token i, one place (counted once) or two (counted half): float32 (vocab_size, vocab_size).

    At most `MOST_TOKENS` are read, from evenly spaced places. The few pairs that span two documents are counted too.
    """
    tokens = documents.tokens
    total = scipy.sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float32)
    starts = range(0, len(tokens), max(CHUNK, len(tokens) * CHUNK // MOST_TOKENS))
    for start in starts:
        chunk = np.asarray(tokens[start : start + CHUNK], dtype=np.int32)
        for distance, weight in enumerate(NEIGHBOUR_WEIGHTS, 1):
            pairs = (chunk[:-distance], chunk[distance:])
            weights = np.full(len(pairs[0]), weight, np.float32)
            total = total + scipy.sparse.coo_matrix((weights, pairs), shape=total.shape).tocsr()
    return total


def neighbourhood_vectors(counts: scipy.sparse.csr_matrix, dimensions: int, seed: int) -> np.ndarray:
    """Principal directions of the tokens' positive pointwise mutual information with followers and predecessors.

    Returns:
        float32 (vocab_size, dimensions or what the counts can give); a zero row for a token without neighbours.
    """
    information = scipy.sparse.hstack([positive_information(counts), positive_information(counts.T.tocsr())]).tocsr()
    directions, sizes, _ = randomized_svd(information, min(dimensions, len(counts.indptr) - 1), n_iter=3, random_state=seed)
    return np.ascontiguousarray(directions * np.sqrt(sizes), dtype=np.float32)


def positive_information(counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """max(0, log p(context | token) / p(context)), with smoothed p(context), where a pair was seen."""
    pairs = counts.tocoo()
    of_token, of_context = np.asarray(counts.sum(1)).ravel(), np.asarray(counts.sum(0)).ravel() ** CONTEXT_SMOOTHING
    information = np.log(pairs.data / (of_token[pairs.row] * (of_context / of_context.sum())[pairs.col]))
    kept = information > 0
    return scipy.sparse.csr_matrix((information[kept], (pairs.row[kept], pairs.col[kept])), shape=counts.shape, dtype=np.float32)
