"""How often another trainer evaluates and saves, and where it reports to, in a recipe's words.

None of it changes what is learnt, so nothing is written where the input is silent. Rows are packed full here: an epoch may have
fewer steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaccu.train.foreign.headings import BEFORE, MEANINGLESS, OFF, UNSUPPORTED
from chaccu.train.foreign.values import number, switched_off, text, whole

if TYPE_CHECKING:
    from chaccu.train.foreign.translation import Translation

_TRACKERS = ("wandb", "trackio", "tensorboard")
_OTHERS = ("mlflow", "comet", "swanlab")


def translate_watching(translation: Translation) -> None:
    """Fill `eval_steps`, `save_steps`, `save_total_limit` and `report_to`."""
    _translate_every(translation, "eval_steps", ("eval_strategy", "evaluation_strategy"))
    if "eval_steps" in translation.fields and not translation.fields.get("validation"):
        steps = translation.fields.pop("eval_steps")
        translation.remark(BEFORE, f"Once validation names data, eval_steps={steps} evaluates as often as there.")
    _translate_every(translation, "save_steps", ("save_strategy",))
    limit = translation.left.get("save_total_limit")
    if "save_steps" in translation.fields and limit is not None and whole("save_total_limit", limit) > 0:
        translation.put(
            "save_total_limit", "save_total_limit", whole("save_total_limit", translation.left.pop("save_total_limit"))
        )
    _translate_trackers(translation)


def _translate_every(translation: Translation, field: str, strategies: tuple[str, ...]) -> None:
    """A number of steps, unless the strategy beside it says otherwise."""
    left = translation.left
    named = next((name for name in strategies if name in left), "")
    strategy = text(named, left.pop(named)).lower() if named and left[named] not in (True, False) else "steps"
    if named and strategy in ("no", "false", "none"):
        idle = [named, *([field] if left.pop(field, None) is not None else [])]
        translation.remark(MEANINGLESS, f"{', '.join(idle)}: {OFF}")
        return
    if named and strategy != "steps":
        translation.remark(UNSUPPORTED, f"{named}: {strategy} is not there; {field} counts steps")
        if left.pop(field, None) is not None:
            translation.remark(MEANINGLESS, f"{field}: {named} stands before it")
        return
    if named:
        translation.remark(MEANINGLESS, f"{named}: {field} says it")
    if field not in left:
        return
    steps = number(field, left.pop(field))
    if steps >= 1 and steps == int(steps):
        translation.put(field, field, int(steps))
    elif steps > 0:
        translation.remark(UNSUPPORTED, f"{field}: a share of the run; it counts steps here")
    else:
        translation.remark(MEANINGLESS, f"{field}: {OFF}")


def _translate_trackers(translation: Translation) -> None:
    left = translation.left
    asked: dict[str, str] = {}
    given = left.pop("report_to", None)
    if given is not None:
        listed = given if isinstance(given, list) else [given]
        names = [name for one in listed for name in str(one).lower().replace(",", " ").split()]
        asked |= dict.fromkeys(names, "report_to")
    for name in (*_TRACKERS, *_OTHERS):
        for key in (f"use_{name}", f"{name}_project"):
            if key in left and not switched_off(left[key]):
                asked.setdefault(name, key)
    known = [name for name in _TRACKERS if name in asked]
    if known:
        note = "TensorBoard files are written too" if known[0] != "tensorboard" else ""
        translation.put(asked[known[0]], "report_to", known[0], note)
        left.pop(asked[known[0]], None)
    elif asked and set(asked) <= {"none", "no", "false"}:
        translation.put("report_to", "report_to", "none")
    for name, key in asked.items():
        if name not in known[:1] and name not in ("none", "no", "false", "all"):
            translation.remark(UNSUPPORTED, f"{key}: one of tensorboard, wandb and trackio is told of a run")
    if "all" in asked:
        translation.remark(MEANINGLESS, "report_to: all is what is installed there; TensorBoard files are written here")
