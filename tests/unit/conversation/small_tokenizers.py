"""Two small tokenizers of the kinds in use: byte-level BPE, and BPE in the way of SentencePiece.

Both know the control tokens of all shipped formats as special tokens.
"""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from chaccu.conversation import TextTokenizer

CONTROL = (
    "<s>",
    "</s>",
    "<bos>",
    "<eos>",
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
KINDS = ("byte_level", "sentencepiece")
_CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What is a vicuña? ASSISTANT: A small relative of the llama.\n\nIt lives in the Andes.",
    "system\nuser\nassistant\nmodel\nthe user asks and the assistant answers\n\n\n",
    "def largest(numbers):\n    return max(numbers)  # two  spaces\n\n",
    " the   answer is  42.   ",
)


@cache
def build_tokenizer(kind: str) -> TextTokenizer:
    """The tokenizer called `kind`; BOS is `<s>` and EOS `</s>`."""
    backend = {"byte_level": _build_byte_level, "sentencepiece": _build_sentencepiece}[kind]()
    return TextTokenizer(backend, bos_token="<s>", eos_token="</s>")


def _build_byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(CONTROL), show_progress=False
    )
    backend.train_from_iterator(_CORPUS * 2, trainer)
    return backend


def _build_sentencepiece() -> Tokenizer:
    """As LLaMA's: a mark before the first word, no pre-tokenizer, bytes for unknown characters, BOS before every text."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator(_CORPUS * 2, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False))
    learned = learner.to_str()
    model = json.loads(learned)["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *(token for token in model["vocab"] if token != "<unk>")]
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = learner.normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    bos_id = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_id)])
    return backend
