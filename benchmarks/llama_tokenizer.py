"""A folder with both spellings of a LLaMA tokenizer: the SentencePiece model as the reference reads it, and an equal
`tokenizer.json`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from chaccu.weights.gguf_tokenizer import merges_from_scores

PROBES = ("Hello  world\n\ndef f(x):\n    return x\t# π", "  two leading spaces", "漢字 🦙 naïve", "</s> USER: <0x0A>", "")


def write_tokenizer_folder(model: Path, folder: Path) -> Path:
    """Write `folder` from a SentencePiece BPE model with byte fallback. Raises `ValueError` when the two differ on a probe."""
    pieces = SentencePieceProcessor(model_file=str(model))
    tokens = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = merges_from_scores(vocabulary, [pieces.get_score(index) for index in range(len(tokens))])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    tokenizer.encode_special_tokens = True
    for probe in PROBES:
        if tokenizer.encode(probe, add_special_tokens=False).ids != pieces.encode(probe):
            raise ValueError(f"tokenizer.json would differ from {model} on {probe!r}")
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(model, folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
    }
    config |= {"add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
