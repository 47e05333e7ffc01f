"""How many tokens a step takes, and on how many processes, in a recipe's words.

Invariant: where the launcher says how many processes there were, a step here has as many tokens as one there could have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaccu.train.foreign.command import COUNTING_FLAGS
from chaccu.train.foreign.headings import BEFORE, DEFAULTS, MEANINGLESS, TRANSLATED, UNSUPPORTED
from chaccu.train.foreign.values import switched_off, whole

if TYPE_CHECKING:
    from chaccu.train.foreign.translation import Translation

# Keys that spread weights, gradients and moments over the processes, as FSDP2 does here.
_SHARDS = ("deepspeed", "sharded_ddp", "fsdp")


def translate_step_size(translation: Translation) -> None:
    """Fill `sequence_len`, `micro_batch_tokens`, `processes`, and `global_batch_size` or `gradient_accumulation_steps`."""
    length_key, given = translation.take(*translation.dialect.length)
    length = whole(length_key, given)
    translation.put(length_key, "sequence_len", length)
    batch_key, given = translation.take(*translation.dialect.batch)
    batch = whole(batch_key, given)
    if batch > 1:
        translation.put(batch_key, "micro_batch_tokens", batch * length, f"{batch} x {length:,} tokens in one row")
    else:
        heading = DEFAULTS if batch_key in translation.defaulted else TRANSLATED
        translation.remark(heading, f"{batch_key} -> a row of sequence_len tokens")
    left = translation.left
    if "batch_size" in left and "gradient_accumulation_steps" not in left and batch > 0:
        total = whole("batch_size", left.pop("batch_size"))
        translation.put("batch_size", "gradient_accumulation_steps", max(1, total // batch), f"{total} by {batch}")
    else:
        translation.direct("gradient_accumulation_steps", ("gradient_accumulation_steps",), whole)
    _translate_processes(translation, batch)


def _translate_processes(translation: Translation, batch: int) -> None:
    count = translation.command.processes if translation.command else None
    fields, left = translation.fields, translation.left
    shards = [key for key in left if key.startswith(_SHARDS) and not switched_off(left[key])]
    if count is None or count == 1 or batch < 1:
        for key in shards:
            del left[key]
        if shards:
            translation.remark(
                UNSUPPORTED,
                f"{', '.join(shards)}: one process shards nothing. With processes: N, weights, gradients and moments lie "
                "spread over N GPUs; on one GPU memory is saved by optimizer: adamw_8bit with optimizer_in_backward "
                "(method: full), activation_checkpointing: full, or method: lora",
            )
        return
    steps = fields.pop("gradient_accumulation_steps")
    launcher = translation.command.launcher if translation.command else []
    names = ", ".join(name for name in launcher if name in COUNTING_FLAGS)
    translation.put(names, "processes", count)
    translation.put(names, "global_batch_size", batch * steps * count, f"{batch} x {steps} x {count}")
    for key in shards:
        del left[key]
    if shards:
        translation.remark(
            MEANINGLESS,
            f"{', '.join(shards)}: processes: {count} spreads weights, gradients and moments over the GPUs (FSDP2); nothing is "
            "kept in the processor's memory",
        )


def compare_steps(translation: Translation) -> None:
    """Say what a step holds there and here."""
    fields = translation.fields
    length, processes = fields["sequence_len"], fields.get("processes")
    row = fields.get("micro_batch_tokens", length)
    batch = row // max(length, 1)
    packed = translation.trainer == "axolotl" and not switched_off(translation.left.get("sample_packing"))
    one = "rows" if packed else "conversations"
    known = translation.command.processes if translation.command else None
    steps = fields.get("gradient_accumulation_steps")
    if steps is None:
        steps = fields["global_batch_size"] // max(batch * (processes or 1), 1)
    there = batch * steps * (known or 1)
    over = f" x {known} processes" if known else " on each process"
    tokens = steps * row * (processes or 1)
    where = f"on {processes} processes" if processes else "on one process"
    translation.remark(
        BEFORE,
        f"A step there: {batch} x {steps}{over} = {there:,} {one} of at most {length:,} tokens, so at most "
        f"{there * length:,} tokens{'' if packed else ', padding included'}. A step here: {steps} packed rows of "
        f"{row:,} tokens {where} = {tokens:,} tokens."
        + ("" if packed else " Rows are packed full, so it holds more conversations where they are short."),
    )
    if processes:
        translation.remark(
            BEFORE, f"On fewer GPUs: chaccu train RECIPE processes=1 takes the same steps, {tokens:,} tokens each"
        )
    elif known is None:
        translation.remark(
            BEFORE,
            "How many processes ran there is not said: processes=N takes N times as many tokens in a step, as there; on one "
            "GPU so does N times gradient_accumulation_steps.",
        )
