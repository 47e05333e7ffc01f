"""How another trainer stretches positions, in a recipe's words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chaccu.errors import RecipeError
from chaccu.train.foreign.command import script_stem
from chaccu.train.foreign.headings import BEFORE, MEANINGLESS, OFF, TRANSLATED, UNSUPPORTED
from chaccu.train.foreign.values import number, switched_off, text, whole
from chaccu.train.recipe import RopeScaling, parse_rope_scaling

if TYPE_CHECKING:
    from chaccu.train.foreign.translation import Translation

_LLAMA_POSITIONS = 2048
# Written beside what the base's config says already, or by no one here.
_IDLE = ("rope_theta", "type")


def translate_positions(translation: Translation) -> None:
    """Fill `rope_scaling`, or say why the trainer's own way is not known here."""
    left = translation.left
    for outer in ("overrides_of_model_config", "overrides_of_model_kwargs"):
        inner = left.get(outer)
        if isinstance(inner, dict) and "rope_scaling" in inner and "rope_scaling" not in left:
            left["rope_scaling"] = inner.pop("rope_scaling")
            translation.remark(TRANSLATED, f"{outer}: its rope_scaling is read as if it stood outside")
            if not inner:
                del left[outer]
    if "use_rope_scaling" in left:
        translation.remark(MEANINGLESS, f"use_rope_scaling: {OFF if switched_off(left['use_rope_scaling']) else 'see below'}")
        del left["use_rope_scaling"]
    given = left.pop("rope_scaling", None)
    if isinstance(given, dict):
        _translate_values(translation, given)
    elif given is not None and not switched_off(given):
        _tell_of_a_name(translation, text("rope_scaling", given))
    elif given is not None:
        translation.remark(MEANINGLESS, f"rope_scaling: {OFF}")
    elif script_stem(translation.command).startswith("train") and translation.fields["sequence_len"] > _LLAMA_POSITIONS:
        translation.remark(
            BEFORE,
            "FastChat stretches positions linearly where model_max_length is beyond the model's; chaccu train stops there and "
            "says which rope_scaling it takes",
        )


def _translate_values(translation: Translation, given: dict[str, Any]) -> None:
    values = {"rope_type": given.get("rope_type", given.get("type")), **given}
    fields = {key: value for key, value in values.items() if key in RopeScaling.__struct_fields__ and value is not None}
    for key in fields:
        if key != "rope_type":
            read = whole if key == "original_max_position_embeddings" else number
            fields[key] = read(f"rope_scaling.{key}", fields[key])
    try:
        parse_rope_scaling(fields)
    except RecipeError as error:
        translation.remark(UNSUPPORTED, f"rope_scaling: it is none that is known here: {error.message}")
        return
    translation.put("rope_scaling", "rope_scaling", fields)
    unknown = [key for key in values if key not in (*RopeScaling.__struct_fields__, *_IDLE)]
    if unknown:
        translation.remark(UNSUPPORTED, f"rope_scaling: {', '.join(map(str, unknown))} has no like")


def _tell_of_a_name(translation: Translation, name: str) -> None:
    """LLaMA-Factory names the way alone, and takes the factor from the model's length."""
    if name in ("linear", "dynamic", "yarn", "llama3"):
        translation.remark(
            BEFORE,
            f"rope_scaling: {name} takes its factor from the model's length there. Where sequence_len is beyond that, chaccu "
            f"train stops and says the factor: rope_scaling: {{rope_type: {name}, factor: …}}",
        )
        return
    translation.remark(UNSUPPORTED, "rope_scaling: linear, dynamic, yarn and llama3 are known")
