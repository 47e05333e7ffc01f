"""Whether another trainer trains all weights or an adapter, and the adapter's form, in a recipe's words."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from chaccu.train.foreign.command import script_stem
from chaccu.train.foreign.headings import BEFORE, MEANINGLESS, OFF, TRANSLATED, UNSUPPORTED
from chaccu.train.foreign.values import number, text, truth, whole
from chaccu.train.recipe import LoraOptions

if TYPE_CHECKING:
    from chaccu.train.foreign.translation import Translation

# Keys that put the base into 4 bits, and what they may say besides.
_FOUR_BITS = ("load_in_4bit", "use_4bit", "quantization_bit")
_KINDS = ("bnb_4bit_quant_type", "quantization_type")
_PACKERS = ("quantization_method",)
_DOUBLE = ("bnb_4bit_use_double_quant", "double_quantization")


def translate_method(translation: Translation) -> None:
    """Fill `method` and `lora`."""
    method = {
        "fastchat": _fastchat_method,
        "axolotl": _axolotl_method,
        "llama-factory": _llama_factory_method,
    }[translation.trainer](translation)
    if method != "full":
        translation.fields["method"] = method = _with_its_base(translation, method)
        _translate_lora(translation)
        return
    translation.fields["method"] = method
    idle = [key for key in translation.left if key.startswith("lora_")]
    for key in idle:
        del translation.left[key]
    if idle:
        translation.remark(MEANINGLESS, f"{', '.join(idle)}: the method is full")


def _with_its_base(translation: Translation, method: str) -> str:
    """`qlora` where the adapter's base lies in 4 bits there, with a remark for each key that says how; else `method`."""
    left = translation.left
    for key in _FOUR_BITS:
        packed = whole(key, left[key]) == 4 if key == "quantization_bit" and key in left else truth(key, left.get(key, False))
        if packed:
            del left[key]
            method = "qlora"
            translation.remark(TRANSLATED, f"{key} -> method: qlora")
    if method != "qlora":
        return method
    for key in (*_KINDS, *_PACKERS):
        if key in left:
            given = text(key, left.pop(key)).lower()
            same = given in ("nf4", "bnb", "bitsandbytes")
            translation.remark(MEANINGLESS if same else UNSUPPORTED, f"{key}: the base is packed by bitsandbytes, as nf4")
    for key in _DOUBLE:
        if key in left:
            same = truth(key, left.pop(key))
            translation.remark(MEANINGLESS if same else UNSUPPORTED, f"{key}: double quantisation is always on")
    for key in [key for key in left if key in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "quantization_device_map")]:
        del left[key]
        translation.remark(MEANINGLESS, f"{key}: precision says in what is multiplied; the 4 bits lie in bytes")
    return method


def _fastchat_method(translation: Translation) -> str:
    script = script_stem(translation.command)
    named = [key for key in translation.left if key in ("q_lora", "use_peft") or key.startswith("lora_")]
    q_lora = truth("q_lora", translation.left.pop("q_lora", False))
    if "q_lora" in named and not q_lora:
        translation.remark(MEANINGLESS, f"q_lora: {OFF}")
    lora = "lora" in script or (bool(named) and truth("use_peft", translation.left.get("use_peft", True)))
    why = f"the keys {', '.join(named)}" if named else f"the script is {script}" if lora else "no lora key is given"
    method = "qlora" if q_lora else "lora" if lora else "full"
    translation.remark(TRANSLATED, f"method: {method} ({why})")
    return method


def _axolotl_method(translation: Translation) -> str:
    adapter = translation.left.pop("adapter", None)
    method = "qlora" if adapter == "qlora" else "lora" if adapter else "full"
    translation.remark(TRANSLATED, f"adapter -> method: {method}" if adapter else "no adapter is given -> method: full")
    if adapter not in (None, "", "lora", "qlora"):
        translation.remark(UNSUPPORTED, f"adapter: {adapter} is written as lora; the other methods are qlora and full")
    return method


def _llama_factory_method(translation: Translation) -> str:
    key, kind = translation.take("finetuning_type")
    translation.put(key, "method", "full" if kind == "full" else "lora")
    if kind not in ("full", "lora"):
        translation.remark(UNSUPPORTED, f"finetuning_type: {kind} is written as lora; the other method is full")
    return str(translation.fields["method"])


def _translate_lora(translation: Translation) -> None:
    options = LoraOptions()
    rank_key, rank = translation.take(*translation.dialect.rank)
    alpha_key, alpha = translation.take("lora_alpha")
    if alpha is None and translation.trainer == "llama-factory":
        translation.use_default(alpha_key)
        alpha = 2 * whole(rank_key, rank)
    for key, field, value in ((rank_key, "rank", rank), (alpha_key, "alpha", alpha)):
        if value is None:
            translation.remark(BEFORE, f"{key} is not given: lora.{field} is left at Chaccu's {getattr(options, field)}")
        else:
            translation.put(key, f"lora.{field}", whole(key, value))
    key, dropout = translation.take("lora_dropout")
    translation.put(key, "lora.dropout", number(key, dropout))
    _translate_targets(translation)
    lora = {"rank": options.rank, "alpha": options.alpha, **translation.fields["lora"]}
    for key in ("use_rslora", "peft_use_rslora"):
        if key in translation.left and truth(key, translation.left[key]):
            del translation.left[key]
            same = round(lora["alpha"] * math.sqrt(lora["rank"]))
            translation.remark(
                UNSUPPORTED, f"{key}: an update is scaled by alpha / rank; lora.alpha={same} gives the same scale"
            )


def _translate_targets(translation: Translation) -> None:
    if "lora_target_linear" in translation.left:
        linear = truth("lora_target_linear", translation.left.pop("lora_target_linear"))
        if linear:
            translation.put("lora_target_linear", "lora.target_modules", "all-linear")
            if translation.left.pop("lora_target_modules", None) is not None:
                translation.remark(MEANINGLESS, "lora_target_modules: lora_target_linear takes in all linear layers")
            return
        translation.remark(MEANINGLESS, f"lora_target_linear: {OFF}")
    key, value = translation.take(*translation.dialect.targets)
    listed = value if isinstance(value, list) else [value]
    names = [name for one in listed for name in text(key, one).replace(",", " ").split()]
    if names in (["all"], ["all-linear"], ["all_linear"]):
        translation.put(key, "lora.target_modules", "all-linear")
    elif isinstance(value, str) and re.search(r"[\\^$*+?()|\[\]]", value):
        translation.put(key, "lora.target_modules", value)
    else:
        if "lm_head" in names and len(names) > 1:
            names.remove("lm_head")
            translation.remark(UNSUPPORTED, f"{key}: lm_head is left out; lora.trainable_tokens trains single rows of it")
        translation.put(key, "lora.target_modules", names)
