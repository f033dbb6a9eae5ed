"""What a run is made of: tokenizer, batches and model, all from its configuration."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from nsa.models import NSALlamaForCausalLM
from nsa.modules.attention import NativeSparseAttention
from nsa.modules.selector_loss import QUERIES
from nsa.training.cache import Cache
from nsa.training.config import TrainConfig
from nsa.training.corpus import Corpus
from nsa.training.data import FixedBatches, TrainingBatches, retrieval_batches, text_batches
from nsa.training.documents import Documents, tokenized
from nsa.training.folder import DATA_FILE, at_home
from nsa.training.readers import Document
from nsa.training.sizes import model_config
from nsa.training.tokenizer import byte_tokenizer, cached_bpe, encoder, fingerprint, load_tokenizer

RETRIEVAL_ROWS = 32
FILLER_CHARACTERS = 16_000_000  # of the corpus, between a definition and its use


def make_tokenizer(config: TrainConfig, corpus: Corpus, cache: Cache) -> PreTrainedTokenizerBase:
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    if config.tokenizer == "bpe":
        if not corpus.train or corpus.train_tokens:
            raise ValueError("a bpe tokenizer is trained on text; for a token file name the folder of its tokenizer")
        return cached_bpe([document.text for document in corpus.train], config.vocab_size, corpus.fingerprint, cache)
    return load_tokenizer(str(at_home(config.tokenizer)))


def make_data(
    config: TrainConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, cache: Cache
) -> tuple[TrainingBatches, dict[str, FixedBatches]]:
    """Training batches, and evaluation's: held-out text, and retrieval with held-out names in held-out text."""
    encode = encoder(tokenizer)
    documents, held_out = tokenized(corpus, tokenizer, cache)
    train_set = TrainingBatches(
        documents,
        config.stages,
        config.batch_tokens,
        encode=encode,
        filler=_filler(corpus.train, documents, tokenizer),
        seed=config.seed,
        layout=config.layout,
        batches_per_step=config.accumulation,
        answer_weight=config.answer_weight,
    )
    eval_sets = {"text": text_batches(held_out, config.context, config.batch_tokens, config.eval_tokens)}
    if any(stage.retrieval for stage in config.stages):
        filler = _filler(corpus.validation, held_out, tokenizer)
        eval_sets["retrieval"] = retrieval_batches(
            encode, filler, config.context, config.batch_tokens, RETRIEVAL_ROWS, config.seed
        )
    return train_set, eval_sets


def _filler(texts: tuple[Document, ...], documents: Documents, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of the corpus; from tokens where there is no other."""
    parts, size = [], 0
    for document in texts:
        if size < FILLER_CHARACTERS:
            parts.append(document.text[: FILLER_CHARACTERS - size])
            size += len(parts[-1])
    return "\n".join(parts) or tokenizer.decode(documents.tokens[:1_000_000])


def make_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> NSALlamaForCausalLM:
    """The model, its weights drawn from the seed."""
    torch.manual_seed(config.seed)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = NSALlamaForCausalLM(model_config(config, len(tokenizer), **special))
    starts = torch.tensor([config.compressed_gate_bias, config.selected_gate_bias, config.window_gate_bias])
    for module in model.modules():
        if isinstance(module, NativeSparseAttention):
            with torch.no_grad():
                module.g_proj.bias.copy_(starts.repeat(module.num_heads))
    return model


def train_selectors(model: nn.Module, weight: float, queries: int = QUERIES) -> None:
    """Every backward pass adds weight times the mean over layers of the selector's own loss of so many queries."""
    layers = [module for module in model.modules() if isinstance(module, NativeSparseAttention)]
    for layer in layers:
        layer.selector_weight, layer.selector_queries = weight / len(layers), queries


def fingerprints(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What tells this data from any other."""
    return {"data": corpus.fingerprint, "tokenizer": fingerprint(tokenizer)}


def check_same_data(run: Path, now: dict[str, str], *, resume: bool) -> None:
    """Keep fingerprints of the data beside a new run; ValueError in one line where a continued run's are others."""
    path = run / DATA_FILE
    if not resume:
        path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in now if saved[name] != now[name]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--resume: {path} does not say what the run's data was, so it cannot be the same") from error
    if changed:
        raise ValueError(
            f"--resume: the {' and the '.join(changed)} of {run} changed since it was started; "
            "start a new run in another --out"
        )
