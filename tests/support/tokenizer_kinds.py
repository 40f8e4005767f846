"""Training of tiny tokenizers: one tokenizer of each kind in the supported families, with the family's special tokens.

Each function returns (tokenizers.Tokenizer, tokenizer_config.json as a dict). Training is deterministic.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from tests.support.corpus import SENTENCES

TokenizerAndConfig = tuple[Tokenizer, dict[str, Any]]

LLAMA3_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<|finetune_right_pad_id|>",
)
FALCON_SPECIALS = ("<|endoftext|>", ">>QUESTION<<", ">>ANSWER<<", "<|im_start|>", "<|im_end|>")
METASPACE = "▁"


def llama3(vocab_size: int) -> TokenizerAndConfig:
    """Return a byte-level BPE with LLaMA 3's split and special tokens. A post-processor puts
    <|begin_of_text|> first.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train_byte_level(tokenizer, vocab_size, LLAMA3_SPECIALS)
    bos = LLAMA3_SPECIALS[0]
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _put_first(tokenizer, bos)]
    )
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "clean_up_tokenization_spaces": False,
    }


def falcon(vocab_size: int) -> TokenizerAndConfig:
    """Return a byte-level BPE with Falcon's pre-tokenizers: punctuation, byte level, digits in
    threes. There is no BOS.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train_byte_level(tokenizer, vocab_size, FALCON_SPECIALS)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": [">>QUESTION<<", ">>ANSWER<<", "<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
    }


def llama2(vocab_size: int) -> TokenizerAndConfig:
    """Return a tokenizer like LLaMA 2's: BPE with byte fallback, and a normalizer that puts a space before each text.
    Its config names the class LlamaTokenizer."""
    tokenizer = Tokenizer(_byte_fallback_model(vocab_size))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)])
    return _finish_sentencepiece(tokenizer, {"tokenizer_class": "LlamaTokenizer", "legacy": False})


def mistral(vocab_size: int) -> TokenizerAndConfig:
    """Return a BPE with byte fallback as in Mistral v0.3's file, with a Metaspace pre-tokenizer and
    instruction tokens.
    """
    controls = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
    tokenizer = Tokenizer(_byte_fallback_model(vocab_size, (*controls, "[/TOOL_RESULTS]")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=METASPACE, prepend_scheme="first", split=False)
    for control in (*controls, "[/TOOL_RESULTS]"):
        tokenizer.add_special_tokens([AddedToken(control, special=True, normalized=False)])
    return _finish_sentencepiece(tokenizer, {"tokenizer_class": "LlamaTokenizer"})


def _finish_sentencepiece(tokenizer: Tokenizer, config: dict[str, Any]) -> TokenizerAndConfig:
    """Add the decoder, the special tokens and the BOS post-processor that all sentencepiece conversions share."""
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = _put_first(tokenizer, "<s>")
    config |= {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    return tokenizer, config


def _put_first(tokenizer: Tokenizer, token: str) -> processors.TemplateProcessing:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, token_id)]
    )


def _train_byte_level(tokenizer: Tokenizer, vocab_size: int, specials: Sequence[str]) -> None:
    """Train a tokenizer on the corpus. Special tokens get the ids after those of the ordinary tokens, as in published
    tokenizers."""
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} pieces, not {vocab_size}: ask for fewer")


def _byte_fallback_model(vocab_size: int, controls: Sequence[str] = ()) -> BPE:
    """Return a BPE model with <unk> <s> </s>, control tokens, 256 byte pieces, and then trained pieces. Rare characters
    have no piece.
    """
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement=METASPACE, prepend_scheme="first")
    head = ["<unk>", "<s>", "</s>", *controls, *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = _common_characters(110)
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(head),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),  # the trainer chooses at random among equally rare characters
        show_progress=False,
    )
    trained.train_from_iterator(SENTENCES, trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    vocab = {piece: number for number, piece in enumerate([*head, *(piece for piece, _ in pieces)])}
    if len(vocab) != vocab_size:
        raise ValueError(f"the corpus gives {len(vocab)} pieces, not {vocab_size}: ask for fewer")
    merges = [(left, right) for left, right in _merges(trained)]
    return BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _common_characters(count: int) -> list[str]:
    tally = Counter("".join(SENTENCES).replace(" ", METASPACE))
    return sorted(tally, key=lambda character: (-tally[character], character))[:count]


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return merges


def synthetic(vocab_size: int) -> Tokenizer:
    """Return an untrained byte-level tokenizer of `vocab_size`. Its merges follow a fixed pattern."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)}
    pieces, merges = list(letters), []
    wanted = vocab_size - len(LLAMA3_SPECIALS)
    for left in pieces:
        for right in letters:
            joined = left + right
            if len(vocab) < wanted and joined not in vocab:
                vocab[joined] = len(vocab)
                merges.append((left, right))
                pieces.append(joined)
        if len(vocab) >= wanted:
            break
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA3_SPECIALS])
    bos = LLAMA3_SPECIALS[0]
    tokenizer.post_processor = _put_first(tokenizer, bos)
    return tokenizer
