"""Three small tokenizers of the kinds in use: byte-level BPE, BPE in LLaMA's way of SentencePiece, and in Gemma's.

All know the control tokens of the shipped formats: `CONTROL` as special tokens, and `ADDED` as added tokens that the tokenizer
does not call special, as some published ones have them.
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
    "<|im_sep|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<|end|>",
    "<|prompter|>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)
ADDED = ("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|USER|>", "<|ASSISTANT|>", "### End")
KINDS = ("byte_level", "sentencepiece", "gemma")
_CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What is a vicuña? ASSISTANT: A small relative of the llama.\n\nIt lives in the Andes.",
    "system\nuser\nassistant\nmodel\nthe user asks and the assistant answers\n\n\n",
    "def largest(numbers):\n    return max(numbers)  # two  spaces\n\n",
    " the   answer is  42.   ",
)


@cache
def build_tokenizer(kind: str) -> TextTokenizer:
    """The tokenizer called `kind`; BOS is `<s>` and EOS `</s>`, Gemma's `<bos>` and `<eos>`."""
    if kind == "byte_level":
        return TextTokenizer(_build_byte_level(), bos_token="<s>", eos_token="</s>")
    if kind == "sentencepiece":
        mark = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return TextTokenizer(_build_sentencepiece(mark, "<s>"), bos_token="<s>", eos_token="</s>")
    return TextTokenizer(_build_sentencepiece(normalizers.Replace(" ", "▁"), "<bos>"), bos_token="<bos>", eos_token="<eos>")


def _add_control(backend: Tokenizer) -> None:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])


def _build_byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(_CORPUS * 2, trainer)
    _add_control(backend)
    return backend


def _build_sentencepiece(normalizer: normalizers.Normalizer, bos: str) -> Tokenizer:
    """Marks for spaces, no pre-tokenizer, bytes for unknown characters, BOS before every text."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
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
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _add_control(backend)
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    return backend
