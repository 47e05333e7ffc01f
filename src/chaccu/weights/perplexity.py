"""How well a model foretells a text that it was not trained on: what quantising costs, in one figure.

Perplexity is exp of the mean negative log-likelihood of a token, in nats (Jelinek et al. 1977), over windows that overlap: each
token but those of the first window is foretold from at least `window` − `stride` tokens before it, and counted once. With a
tokenizer that has a BOS token each window begins with it. Bits per byte, the sum in bits over the bytes of the text that were
foretold, let models of different tokenizers be compared.

It ignores chat formats: the text is plain. The text that ships (`held_out.txt`) is out of this package's own documentation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import torch

from chaccu.artifact import storage_errors
from chaccu.conversation import TextTokenizer
from chaccu.errors import MissingDependencyError, WeightsError
from chaccu.weights.checkpoint import Checkpoint, Progress
from chaccu.weights.fp8_form import FP8_METHOD, read_fp8
from chaccu.weights.model_files import read_config

WINDOW, STRIDE = 512, 256
TIMED_TOKENS = 48
# Which ids they are does not change how long a token takes.
SPEED_PROMPT = list(range(5, 21))


class Perplexity(msgspec.Struct, frozen=True):
    """`perplexity` over `tokens`, of windows of `window` tokens every `stride`; `bits_per_byte` over `bytes` of text."""

    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    window: int
    stride: int


def read_text(path: Path | None) -> str:
    """The text of a file, or, without one, that which ships. Raises `WeightsError` when it is empty or no UTF-8."""
    if path is None:
        return resources.files("chaccu.weights").joinpath("held_out.txt").read_text(encoding="utf-8")
    with storage_errors(path):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path} is no text in UTF-8: byte {error.start:,} is {data[error.start]:#04x}.") from error
    if not text.strip():
        raise WeightsError(f"{path} holds no text.", remedy="name a file of some 20 kB or more")
    return text


def measure_perplexity(
    foretell: Callable[[torch.Tensor, int], torch.Tensor],
    tokenizer: TextTokenizer,
    text: str,
    *,
    window: int = WINDOW,
    stride: int = STRIDE,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `text`. `foretell(ids_T, n)` gives the logits (n × vocabulary) of what comes after each of the last n ids;
    `progress(done, total)` counts tokens.

    Raises `WeightsError` when there is nothing to foretell, or the likelihood of a token is not a number.
    """
    ids = tokenizer.encode_texts([text], first=[True])[0]
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    total = len(ids) if bos else len(ids) - 1
    if total < 1:
        raise WeightsError(
            f"the text has {len(ids)} tokens: nothing to foretell.", remedy="--text FILE with some 20 kB or more"
        )
    loss, done = 0.0, 0
    for begin, first, end in _windows(len(ids), window, stride):
        sequence = torch.tensor(bos + ids[begin:end])
        count = min(end - first, len(sequence) - 1)
        logits = foretell(sequence[:-1], count)
        loss += float(torch.nn.functional.cross_entropy(logits.float(), sequence[-count:].to(logits.device), reduction="sum"))
        done += count
        if progress:
            progress(done, total)
    if not math.isfinite(loss):
        raise WeightsError("the model gives likelihoods that are not numbers.", remedy="quantise it in more bits")
    unseen = 0 if bos else len(tokenizer.decode(ids[:1]).encode())
    size = len(text.encode()) - unseen
    return Perplexity(math.exp(loss / done), loss / math.log(2) / size, done, size, window, stride)


def _windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first token that counts, end) of each window, the BOS token that may stand before it left out."""
    first, end = 0, min(window, count)
    while True:
        yield max(0, end - window), first, end
        if end == count:
            return
        first, end = end, min(end + stride, count)


def load_model(folder: Path) -> Any:
    """A model of a Hugging Face folder by transformers, on the GPU where there is one, else on the CPU in float32.

    Weights in vLLM's fp8, which transformers does not load, are put in as what they stand for. Raises `WeightsError` when it
    cannot be loaded, `MissingDependencyError` without transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("transformers", extra="train", needed_for="measuring perplexity") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = torch.float32 if device == "cpu" else "auto"
    method = (read_config(folder).get("quantization_config") or {}).get("quant_method")
    options: dict[str, Any] = {"device_map": {"": device}} if method not in (None, FP8_METHOD) else {}
    try:
        if method == FP8_METHOD:
            model = _load_fp8(folder, torch.float32 if device == "cpu" else torch.bfloat16)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise WeightsError(f"transformers cannot load {folder}: {error}") from error
    return (model if options else model.to(device)).eval()


def _load_fp8(folder: Path, dtype: torch.dtype) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    checkpoint = Checkpoint(folder)
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, values in read_fp8(checkpoint):
            targets[name].copy_(values)
    return model


def foretelling(model: Any) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """What `measure_perplexity` asks, of a model of transformers."""

    def foretell(ids_T: torch.Tensor, count: int) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(ids_T[None].to(model.device), use_cache=False, logits_to_keep=count).logits
        return logits[0, -count:]

    return foretell


def measure_speed(model: Any) -> float:
    """Tokens a second that a model of transformers generates greedily, one answer at a time, after a short prompt."""
    ids = torch.tensor([SPEED_PROMPT], device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=2, **options)
        began = time.perf_counter()
        model.generate(ids, min_new_tokens=TIMED_TOKENS, max_new_tokens=TIMED_TOKENS, **options)
    return TIMED_TOKENS / (time.perf_counter() - began)


def window_of(model: Any) -> int:
    """The window to measure with: the usual one, or what the model's positions hold."""
    return min(WINDOW, int(getattr(model.config, "max_position_embeddings", WINDOW)))
